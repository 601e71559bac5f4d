"""The registry of sources for `--data`. A new kind is one file in this folder and one line in the table below.

A source is recognised by the suffixes of its files, or by the files in its folder. The table is read without importing
a source's libraries: an entry only names the function that opens it, and `load` imports it.
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_cmli.common import registry
from ds_cmli.common.errors import UserError
from ds_cmli.data.sources.names import expand


@dataclass(frozen=True)
class Entry:
    implementation: str  # "file.function" of (name, files, `DataConfig`) -> `base.Parts`
    what: str  # a description for error messages
    ends: tuple[str, ...] = ()  # suffixes of its files
    holds: tuple[str, ...] = ()  # its folder holds at least one of these files
    in_folder: bool = False  # whether a folder may be given instead of all such files in it
    extra: str | None = None  # the optional extra of this package that it needs
    settings: tuple[
        str, ...
    ] = ()  # fields of `DataConfig` that only some kinds read, this one among them


SOURCES = {
    "folder": Entry(
        "folder.load_folder",
        "a folder of images with a metadata.jsonl, which has a line like "
        '{"file_name": "1.jpg", "text": "a red bicycle"} for each caption, or a metadata.csv with these columns, or '
        "with such folders train/ and validation/ in it",
        holds=tuple(f"{part}{name}" for part in ("", "train/") for name in ("metadata.jsonl", "metadata.csv")),
    ),
    "tars": Entry(
        "tars.load_tars",
        "uncompressed WebDataset tars such as 'shards/{00000..00019}.tar', or a folder of them",
        ends=(".tar",), in_folder=True, settings=("caption_key",),
    ),
    "parquet": Entry(
        "arrow.load_parquet",
        "parquet files with image bytes, or a folder of them",
        ends=(".parquet",), in_folder=True, extra="parquet", settings=("image_key", "caption_key"),
    ),
    "saved": Entry(
        "arrow.load_saved",
        "a folder that save_to_disk of Hugging Face datasets wrote",
        holds=("dataset_dict.json", "state.json"), extra="parquet", settings=("image_key", "caption_key"),
    ),
    "csv": Entry(
        "csv_list.load_csv",
        "a CSV or TSV of paths and captions",
        ends=(".csv", ".tsv"), settings=("image_root", "image_key", "caption_key", "separator"),
    ),
    "json": Entry(
        "coco.load_json",
        "the JSON of Karpathy's splits or of COCO's caption annotations",
        ends=(".json",), settings=("image_root",),
    ),
}  # fmt: skip


def accepted() -> str:
    """The kinds that `--data` accepts, as the end of an error message."""
    return f"accepted are 'demo' and {'; '.join(entry.what for entry in SOURCES.values())}"


def recognise(name: str) -> tuple[str, list[Path]]:
    """The kind of source that `name` is, and its files. A name of no kind is "folder", which then raises the error.

    Raises:
        UserError: files do not exist or are of several kinds, or a folder could be of two kinds.
    """
    files = expand(name)
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):
        kinds = [
            kind
            for kind, entry in SOURCES.items()
            if any(os.path.exists(folder / file) for file in entry.holds)
        ]
        found: dict[str, list[Path]] = {}
        inside: list[Path] = []
        if not kinds:
            with contextlib.suppress(
                OSError
            ):  # a folder without permission is reported when it is opened
                inside = sorted(folder / file for file in os.listdir(folder))
            found = {
                k: [p for p in inside if p.name.lower().endswith(e.ends)]
                for k, e in SOURCES.items()
                if e.in_folder
            }
            found = _without_companions({kind: paths for kind, paths in found.items() if paths})
            kinds = list(found)
        if len(kinds) > 1:
            what = " and ".join(SOURCES[kind].what for kind in kinds)
            raise UserError(
                f"data.source is {name!r}, which could be meant as {what}: name the files, or keep one kind"
            )
        return (kinds[0], found.get(kinds[0], [])) if kinds else ("folder", [])
    ends = {
        kind: [f for f in files if f.name.lower().endswith(e.ends)]
        for kind, e in SOURCES.items()
        if e.ends
    }
    kinds = [kind for kind, some in ends.items() if some]
    if len(kinds) == 1 and len(ends[kinds[0]]) == len(files):
        return kinds[0], files
    if len(files) > 1:
        raise UserError(
            f"data.source is {name!r}, which names files of several kinds, or of none: {accepted()}"
        )
    return "folder", []  # its loader reports what was given instead


def load(kind: str) -> Callable[..., Any]:
    """Import the file of this kind of source and return the function that opens it."""
    return registry.load(__name__, SOURCES[kind].implementation)


def _without_companions(found: dict[str, list[Path]]) -> dict[str, list[Path]]:
    """Ignore the parquet files that img2dataset writes beside each tar: they hold no images."""
    if {"tars", "parquet"} <= set(found) and {p.stem for p in found["parquet"]} <= {
        p.stem for p in found["tars"]
    }:
        del found["parquet"]
    return found
