"""What a resumed run compares of its data: each fact of the page's table is changed, and noticed or not."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from ds_cmli.data import shard_cache
from profiling.speed import storage_server
from tests import make
from tests.ranks import ROOT
from tests.test_pages import tables

MEMBERS = [("0.png", make.png(0)), ("0.txt", b"a"), ("1.png", make.png(1)), ("1.txt", b"b")]


def make_tars(folder: Path) -> None:
    folder.mkdir()
    make.shard(folder / "0.tar", MEMBERS)
    make.tar(folder / "1.tar", 20, first=10)
    (folder / "sizes.json").write_text(json.dumps({"0.tar": 2, "1.tar": 20}))


def other_image(image: bytes) -> bytes:
    """Return the file of another image, which has as many bytes."""
    make.picture(77, side=16).save(content := io.BytesIO(), "png")
    return content.getvalue().ljust(len(image), b"\0")


def replace(file: str, old: str, new: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = (folder / file).read_text()
        assert content.count(old) == 1
        (folder / file).write_text(content.replace(old, new))

    return change


def write_tar(*members: tuple[str, bytes]) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        size = (folder / "0.tar").stat().st_size
        assert make.shard(folder / "0.tar", members).stat().st_size == size

    return change


def write_rows(change_rows: Callable[[datasets.Dataset], datasets.Dataset]) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (file,) = folder.glob("*.parquet")
        rows = datasets.Dataset.from_parquet(str(file)).cast_column("image", datasets.Image(decode=False))
        change_rows(rows).cast_column("image", datasets.Image()).to_parquet(file)

    return change


def reverse_rows(folder: Path) -> None:
    table = folder / "metadata.jsonl"
    table.write_text("".join(reversed(table.read_text().splitlines(keepends=True))))


def change_picture(folder: Path) -> None:
    make.picture(77).save(folder / "3.png")


def rename_tar(folder: Path) -> None:
    (folder / "0.tar").rename(folder / "00.tar")
    replace("sizes.json", '"0.tar"', '"00.tar"')(folder)


def lengthen_tar(folder: Path) -> None:
    with (folder / "0.tar").open("ab") as file:
        file.write(bytes(512))


def map_images(change_image: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def changed(row: dict) -> dict:
        return {"image": {**row["image"], "bytes": change_image(row["image"]["bytes"])}}

    return write_rows(lambda rows: rows.map(changed))


def change_dates(folder: Path) -> None:
    for file in folder.iterdir():
        os.utime(file, (1e9, 1e9))


CHANGES: dict[str, dict[str, Callable[[Path], object]]] = {  # format of the page -> fact -> change
    "lists (CSV, TSV, JSON)": {
        "names of images": replace("metadata.jsonl", '"3.png"', '"33.png"'),
        "number of images": lambda folder: make.pairs(folder, 25),
        "order of images": reverse_rows,
        "captions": replace("metadata.jsonl", "square 3", "square 4"),
        "the content of image files": change_picture,
        "dates": change_dates,
    },
    "local tars": {
        "names of shards": rename_tar,
        "sizes of shards": lengthen_tar,
        "places of images and captions": write_tar(*MEMBERS[2:], *MEMBERS[:2]),
        "sizes of images and captions": write_tar(*MEMBERS[:3], ("1.txt", b"two")),
        "other content of the same size": write_tar(("0.png", other_image(MEMBERS[0][1])), *MEMBERS[1:]),
        "dates": change_dates,
    },
    "tars in a storage": {
        "addresses of shards": rename_tar,
        "sizes of shards": lengthen_tar,
        "numbers of samples of shards": replace("sizes.json", "20", "19"),
        "other content of the same size": write_tar(*MEMBERS[2:], *MEMBERS[:2]),
        "dates": change_dates,
    },
    "parquet, Arrow, `datasets`": {
        "names of columns": write_rows(lambda rows: rows.rename_column("caption", "text")),
        "number of rows": write_rows(lambda rows: rows.select(range(23))),
        "bytes of the image column": map_images(lambda image: image + b"\0"),
        "bytes of the caption column": write_rows(lambda rows: rows.map(lambda row: {"caption": row["caption"] + "s"})),
        "other content of the same size": map_images(other_image),
        "dates": change_dates,
    },
}
MAKERS = dict(zip(CHANGES, (make.pairs, make_tars, make_tars, make.parquet), strict=True))
(TABLE,) = [body for header, body in tables(ROOT / "docs" / "checkpoints.md") if "not noticed" in header]
IS_COMPARED = {
    (form, fact): is_compared
    for form, *cells in TABLE[:-1]  # the last row is the demo's
    for cell, is_compared in zip(cells, (True, False), strict=True)
    for fact in cell.split(", ")
}


def test_the_page_states_each_fact_that_is_tried_here():
    assert [*IS_COMPARED] == [(form, fact) for form, changes in CHANGES.items() for fact in changes]


@pytest.mark.parametrize("setting", ["source", "val_source"])
@pytest.mark.parametrize(("form", "fact"), IS_COMPARED)
def test_a_resumed_run_notices_what_the_page_says(form, fact, setting, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ds_cmli.data.sources.remote.start_fetching", lambda cache: None)
    monkeypatch.setattr(shard_cache, "ALONE_SECONDS", 0)  # no other process fetches shards
    folder = tmp_path / "changed"
    MAKERS[form](folder)
    other = {"source": make.pairs(tmp_path / "other"), "held_out": 4}

    def compared() -> list[object]:
        """Return what a run compares beside the text of its settings."""
        names = "{" + ",".join(file.stem for file in sorted(folder.glob("*.tar"))) + "}.tar"
        name = f"{server.url}/{names}" if form == "tars in a storage" else str(folder)
        return [*make.data(**other | {setting: name}).fingerprint.values()]

    with storage_server.http(folder) as server:
        before = compared()
        CHANGES[form][fact](folder)
        assert (compared() != before) == IS_COMPARED[form, fact]
