"""What a run writes outside its folder is tried at the start, and nothing is left behind."""

import pytest

from ds_cmli.common.errors import UserError
from ds_cmli.config.start_checks import check_outputs


def written(section, place):
    key = "output_file" if section == "flops_profiler" else "output_path"
    return {section: {"enabled": True, key: str(place)}}


@pytest.mark.parametrize("section", ["flops_profiler", "tensorboard", "csv_monitor"])
def test_a_place_that_cannot_be_written_is_one_line_with_its_setting(section, tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    places = ["file/inside", "file/a/b", "/proc/nothing/x", "a\0b", "x" * 300]
    places += ["folder"] if section == "flops_profiler" else ["file"]
    before = sorted(tmp_path.rglob("*"))
    for place in places:
        with pytest.raises(UserError, match=rf"^{section}.output_\w+ is .*: cannot write there: ") as error:
            check_outputs(written(section, tmp_path / place), [])
        assert "\n" not in str(error.value)
    check_outputs(written(section, tmp_path / "new" / "deep" / "place"), "")
    check_outputs({section: {**written(section, "/proc/x")[section], "enabled": False}}, "")
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "kept"


def test_a_file_that_is_there_is_left_as_it_is(tmp_path):
    (tmp_path / "profile.txt").write_text("of the last run")
    check_outputs(written("flops_profiler", tmp_path / "profile.txt"), "")
    assert (tmp_path / "profile.txt").read_text() == "of the last run"


@pytest.mark.parametrize(
    ("json", "report_to", "words"),
    [({"wandb": {"enabled": True}}, "", "wandb.enabled is true"), ({}, "wandb", "run.report_to is 'wandb'")],
)
def test_wandb_without_a_login(json, report_to, words, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"^{words} and wandb has no login: [^\n]*WANDB_MODE=offline$"):
        check_outputs(json, report_to)
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_outputs(json, report_to)
