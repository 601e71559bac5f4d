"""A source is one file and one entry: it is recognised, trains, is mixed, evaluated, and goes on exactly."""

import json
import zipfile

import pytest
from click.testing import CliRunner

from ds_cmli.common.errors import UserError
from ds_cmli.config.options import source_kinds
from ds_cmli.config.registry import SOURCES, SourceEntry
from ds_cmli.data.sources.find import accepted
from ds_cmli.evaluate.__main__ import command as evaluate
from tests.checkpoint.test_restore import assert_same
from tests.data.sources.samples import build, members, picture, tar
from tests.drive_train import drive

TOY = "tests.stranger.toy_source:load_zip"


@pytest.fixture(autouse=True)
def registered(monkeypatch, alone, tmp_path):
    entry = SourceEntry(TOY, "a zip of pictures", "zip", ends=(".zip",), settings=("separator",))
    monkeypatch.setitem(SOURCES, "zip", entry)
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pictures(tmp_path):
    file = tmp_path / "pictures.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for k in range(30):
            archive.writestr(f"red_apple_{k}.png", picture(k))
        archive.writestr("_.png", picture(0))
    return str(file)


def test_it_trains_is_evaluated_and_goes_on_as_if_never_stopped(tmp_path, pictures):
    run = ["--preset", "tiny", "--steps", "5", "--log-every", "1", "--micro-batch", "4", "--data", pictures]
    run += ["--set", "data.max_bad_share=0.2", "--csv-separator", "x"]
    assert drive([*run, "--output-dir", str(tmp_path / "straight")]) == 0
    broken = [*run, "--output-dir", str(tmp_path / "broken")]
    assert drive([*broken, "--workers", "2"], stop_at=3) == 85
    assert drive(broken) == 0
    assert_same(tmp_path / "straight", tmp_path / "broken")
    (bad,) = (tmp_path / "broken" / "bad.jsonl").read_text().splitlines()
    assert json.loads(bad).items() >= {"name": "_.png", "reason": "empty caption", "when": "load"}.items()
    given = ["--checkpoint", str(tmp_path / "broken"), "--split", "all", "--json", str(tmp_path / "x.json")]
    done = CliRunner().invoke(evaluate, given)
    assert done.exception is None and f"{pictures} is read as x" in done.output
    assert json.loads((tmp_path / "x.json").read_text())["eval/all/pairs"] == 30


def test_it_is_mixed_and_its_settings_are_known(tmp_path, pictures):
    shard = tar(tmp_path / "0.tar", members(range(20)))
    data = build([f"{pictures}::0.5", f"{shard}::0.5"], separator="x", max_bad_share=0.2)
    assert data.mixture.shares == [24, 23] and data.bad[0][0] == f"{pictures}: _.png"
    assert data.fingerprint[pictures]["pictures"] == 28
    assert source_kinds("or").endswith("CSV, JSON or zip") and "a zip of pictures" in accepted()
    with pytest.raises(UserError, match=r"no source here reads it, only csv and zip$"):
        build(shard, separator=",")


def test_the_frame_says_what_to_install(monkeypatch, pictures):
    entry = SourceEntry(TOY, "a zip", ends=(".zip",), package="zips_of_pictures", extra="zips")
    monkeypatch.setitem(SOURCES, "zip", entry)
    with pytest.raises(UserError, match=r"by the package zips_of_pictures: pip install 'ds-cmli\[zips\]'$"):
        build(pictures)
