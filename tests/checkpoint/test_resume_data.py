"""A run goes on with the data that it began with, and with no other."""

import pytest

from ds_cmli.common.errors import UserError
from ds_cmli.config import settings
from tests import make
from tests.drive_train import drive
from tests.stranger.drive import ONE_BLOCK

TINY = ["--preset", "tiny", "--steps", "6", "--log-every", "1", "--micro-batch", "4", "--set", "run.match_maps=0"]


def test_other_data_is_refused_with_what_differs(tmp_path, alone, monkeypatch):
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tars"
    folder.mkdir()
    for k in range(2):
        make.tar(folder / f"{k}.tar", 20, 20 * k)
    run = [*TINY, *ONE_BLOCK, "--data", str(folder), "--output-dir", str(tmp_path / "run")]
    assert drive(run, stop_at=2) == 85
    make.tar(folder / "2.tar", 2, 40)
    with pytest.raises(UserError) as error:
        drive(run)
    size = (folder / "2.tar").stat().st_size
    assert f"sources.{folder}.files.2.tar: not set -> {size}" in str(error.value)
    (folder / "2.tar").unlink()
    assert drive(run) == 0


def test_other_captions_are_refused_or_accepted_with_changes(tmp_path, alone):
    make.pairs(tmp_path / "data", 20)
    run = [*TINY, *ONE_BLOCK, "--data", str(tmp_path / "data"), "--output-dir", str(tmp_path / "run")]
    assert drive(run, stop_at=2) == 85
    table = tmp_path / "data/metadata.jsonl"
    table.write_text(table.read_text().replace("square 3", "circle 3"))
    with pytest.raises(UserError, match=r"data\.content: "):
        drive(run)
    assert drive([*run, "--resume-with-changes"]) == 0


def test_of_many_differences_the_first_are_shown():
    before = {f"sources.x.files.{k:05}.tar": 1 for k in range(1000)}
    lines = settings.differences(before, {}, True)
    assert len(lines) == settings.SHOWN + 1 and lines[-1] == "980 more"
