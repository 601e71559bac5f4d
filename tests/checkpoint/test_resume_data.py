"""Runs on every kind of source, stopped in the middle of an epoch and resumed, against unbroken ones."""

import shutil

import pytest

from ds_cmli.common.errors import UserError
from ds_cmli.config import settings
from tests.checkpoint.test_restore import assert_same, drive, ranks
from tests.data.sources.samples import members, picture, tar
from tests.data.sources.test_arrow import datasets, table
from tests.data.sources.test_coco import coco
from tests.data.sources.test_folder import rows, write

TINY = ["--preset", "tiny", "--steps", "6", "--log-every", "1", "--micro-batch", "4", "--set", "data.max_bad_share=0.2"]


def every_kind(folder, count=20):
    """`--data` options of each kind of source, with several captions where there can be."""
    for k in range(2):
        tar(
            folder / "tars" / f"{k}.tar", [m for m in members(range(count * k, count * (k + 1))) if "7.png" not in m[0]]
        )
    write(folder / "folder", rows(count) + rows(count, "green pear"))
    (folder / "folder" / "003.png").write_bytes(b"no picture")
    table(range(count)).to_parquet(str(folder / "x.parquet"))
    table(range(count)).save_to_disk(str(folder / "saved"))
    for k in range(count):
        (folder / f"{k}.png").write_bytes(picture(k))
    (folder / "x.csv").write_text("filepath\ttitle\n" + "".join(f"{k % count}.png\tred apple {k}\n" for k in range(30)))
    (folder / "coco").mkdir()
    found = {name: ["--data", str(folder / name)] for name in ("tars", "folder", "x.parquet", "saved", "x.csv")}
    found["coco"] = ["--data", str(coco(folder / "coco", count=count))]
    found["mixture"] = ["--data", f"{folder}/tars::0.4", "--data", f"{folder}/folder::0.6"]
    return found


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "arrow"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "arrow"))


def test_every_source_stopped_within_an_epoch_goes_on_as_if_never(tmp_path):
    sources, tasks = every_kind(tmp_path), []
    for name, data in sources.items():
        common = [*TINY, *data]
        tasks += [
            {"arguments": [*common, "--output-dir", f"{tmp_path}/{name}-straight", "--workers", "1"]},
            {"arguments": [*common, "--output-dir", f"{tmp_path}/{name}-broken", "--workers", "1"], "stop_at": 3},
            {"arguments": [*common, "--output-dir", f"{tmp_path}/{name}-broken", "--workers", "0"]},
        ]
    codes, _ = ranks(tmp_path, 2, tasks, timeout=600)
    assert codes == [0, 85, 0] * len(sources)
    for name in sources:
        assert_same(tmp_path / f"{name}-straight", tmp_path / f"{name}-broken")


def test_other_data_is_refused_with_what_differs(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
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
    assert f"{place}.files.2.tar: not set -> {added}; {place}.pictures: 38 -> 40" in str(error.value)
    shutil.move(folder / "2.tar", tmp_path / "2.tar")
    tar(folder / "1.tar", members(range(20, 40), "another red apple {k}, and a longer text " + 600 * "x"))
    with pytest.raises(UserError, match=rf"1.tar: {size} -> "):
        drive(run)
    tar(folder / "1.tar", members(range(20, 40)))
    assert drive(run) == 0


def test_of_many_differences_the_first_are_told():
    before = {f"sources.x.files.{k:05}.tar": 1 for k in range(1000)}
    told = settings.differences(before, {}, True)
    assert len(told) == settings.SHOWN + 1 and told[-1] == "980 more"
