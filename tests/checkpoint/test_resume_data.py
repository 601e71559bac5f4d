"""Runs on every kind of source, stopped in the middle of an epoch and resumed, against unbroken ones."""

import json
import random

import pytest

from ds_cmli.common.errors import UserError
from ds_cmli.config import settings
from ds_cmli.data.sources import base
from tests.data.sources.samples import datasets, members, rows, tar, write
from tests.drive_train import drive
from tests.stranger.drive import ONE_BLOCK

TINY = ["--preset", "tiny", "--steps", "6", "--log-every", "1", "--micro-batch", "4", "--set", "data.max_bad_share=0.2"]
TINY += ["--set", "run.match_maps=0", *ONE_BLOCK]


@pytest.fixture(autouse=True)
def own_caches(alone, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets().config, "HF_DATASETS_CACHE", str(tmp_path / "arrow"))


def test_other_data_is_refused_with_what_differs(tmp_path):
    folder = tmp_path / "tars"
    tar(folder / "0.tar", members(range(20)))
    tar(folder / "1.tar", members(range(20, 40)))
    run = [*TINY, "--data", str(folder), "--output-dir", str(tmp_path / "run")]
    assert drive(run, stop_at=2) == 85
    size = (folder / "1.tar").stat().st_size
    tar(folder / "2.tar", members(range(40, 42)))
    with pytest.raises(UserError) as error:
        drive(run)
    place = f"sources.{folder}"
    added = (folder / "2.tar").stat().st_size
    assert f"{place}.files.2.tar: not set -> {added}; {place}.members: " in str(error.value)
    assert f"; {place}.pictures: 38 -> 40" in str(error.value)
    (folder / "2.tar").unlink()
    tar(folder / "1.tar", members(range(20, 40), "another red apple {k}, and a longer text " + 600 * "x"))
    with pytest.raises(UserError, match=rf"1.tar: {size} -> "):
        drive(run)


def test_of_many_differences_the_first_are_told():
    before = {f"sources.x.files.{k:05}.tar": 1 for k in range(1000)}
    lines = settings.differences(before, {}, True)
    assert len(lines) == settings.SHOWN + 1 and lines[-1] == "980 more"


def test_every_skipped_sample_is_in_the_runs_file_once_also_after_a_stop(tmp_path):
    some = rows(20)
    some[5]["text"] = None
    write(tmp_path / "data" / "train", some)
    write(tmp_path / "data" / "validation", rows(4))
    for name in ("train/003.png", "train/011.png", "validation/002.png"):
        (tmp_path / "data" / name).write_bytes(b"no picture")
    run = [*TINY, "--steps", "14"]
    run += ["--data", str(tmp_path / "data"), "--output-dir", str(tmp_path / "run")]
    assert drive(run, stop_at=2) == 85
    assert drive(run) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "bad.jsonl").read_text().splitlines()]
    result = sorted((line["when"], line["name"], line["reason"].split(":")[0]) for line in lines)
    assert result == [
        ("evaluation", "002.png", "cannot identify image file"), ("load", "005.png", "empty caption"),
        ("training", "003.png", "cannot identify image file"), ("training", "011.png", "cannot identify image file"),
    ]  # fmt: skip


@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_pictures_that_are_other_ones_at_the_next_start_are_refused(change, tmp_path):
    write(tmp_path / "data", rows(20))
    run = [*TINY, "--data", str(tmp_path / "data"), "--output-dir", str(tmp_path / "run")]
    assert drive(run, stop_at=2) == 85
    image = tmp_path / "data" / "005.png"
    image.write_bytes(image.read_bytes() + b"x") if change == "replaced" else image.unlink()
    with pytest.raises(UserError) as error:
        drive(run)
    said = {"replaced": "bytes: ", "deleted": "missing: 0 -> 1"}[change]
    assert f"sources.{tmp_path}/data.{said}" in str(error.value)
    assert drive([*run, "--resume-with-changes"]) == 0


def test_every_bit_of_small_data_counts_and_sampled_blocks_of_large_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "BLOCK_BYTES", 8)
    monkeypatch.setattr(base, "BLOCKS", 16)
    file, other = tmp_path / "file", tmp_path / "other"
    file.write_bytes(random.randbytes(60))  # twice at most 16 blocks of 8 bytes: all of it is read
    for place in range(60):
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        other.write_bytes(content)
        assert base.sampled([other]) != base.sampled([file])
        assert base.sampled([file, other]) != base.sampled([other, file])
    file.write_bytes(random.randbytes(1000))
    assert base.sampled([file] * 99) == base.sampled([file] * 99) != base.sampled([file])
