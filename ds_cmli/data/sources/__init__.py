"""Sources of pairs; `config/registry.py` lists them. Which of them `--data` names is recognised here."""

import contextlib
import os
from pathlib import Path

from ds_cmli.common.errors import UserError
from ds_cmli.config.registry import SOURCES
from ds_cmli.data.sources.names import expand


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


def _without_companions(found: dict[str, list[Path]]) -> dict[str, list[Path]]:
    """Ignore the parquet files that img2dataset writes beside each tar: they hold no images."""
    if {"tars", "parquet"} <= set(found) and {p.stem for p in found["parquet"]} <= {
        p.stem for p in found["tars"]
    }:
        del found["parquet"]
    return found
