"""Recognising what `--data` names: weights, patterns of file names, and the kind of a source."""

import glob
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from importlib import import_module
from itertools import filterfalse
from pathlib import Path

from ds_cmli.common.errors import UserError, check_regular
from ds_cmli.config.registry import SOURCES, SourceEntry, load
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.sources.base import Parts, first_twice
from ds_cmli.data.sources.patterns import WILDCARD, braces, check_there
from ds_cmli.data.sources.remote import is_remote, local_copies

# Names of the parts of a data set.
SPLITS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}


def weighted(sources: str | list[str]) -> tuple[list[str], list[float] | None]:
    """Split names and weights: `["a::0.7", "b::0.3"]` -> `(["a", "b"], [0.7, 0.3])`.

    Returns None instead of no weights.

    Raises:
        UserError: a weight is not a positive number or only some sources have one, a name occurs
            twice, or "demo" is mixed with other sources.
    """
    sources = [sources] if isinstance(sources, str) else sources
    names, weights = [], []
    for source in sources:
        name, mark, weight = source.rpartition("::")
        if mark:
            weights.append(_weight(weight, source, name))
        else:
            name = source
        names.append(name)
    twice = first_twice(names)
    if twice is not None:
        raise UserError(f"--data names {twice!r} twice: keep one")
    if len(names) > 1 and "demo" in names:
        other = names[names.index("demo") - 1]
        raise UserError(f"--data mixes 'demo' with {other!r}: the demo stands alone")
    if weights and len(names) == 1:
        raise UserError(f"--data is {sources[0]!r}, the only source: leave its weight out")
    if weights and len(weights) < len(names):
        raise UserError(
            f"--data gives {len(weights)} of {len(names)} sources a weight: give all one, or none"
        )
    return names, weights or None


def _weight(text: str, source: str, name: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise UserError(
            f"--data is {source!r}: write WHAT::WEIGHT with a number above 0, for instance "
            f"{name}::0.7"
        )
    return weight


def open_source(name: str, config: DataConfig) -> tuple[str, Parts]:
    """Open one source: its kind and its parts. Raises `UserError` as both of these do."""
    kind, files = recognise(name)
    _check_package(name, kind)
    return kind, load(SOURCES[kind])(name, files, config)


def _check_package(name: str, kind: str) -> None:
    """Raise `UserError` if the package that reads a kind is missing."""
    entry = SOURCES[kind]
    if entry.package:
        try:
            import_module(entry.package)
        except ImportError:
            raise UserError(
                f"data.source is {name!r}, which is read by the package {entry.package}: "
                f"pip install 'ds-cmli[{entry.extra}]'"
            ) from None


def recognise(name: str) -> tuple[str, list[Path]]:
    """The kind of source that `name` is, and its files, which are fetched if they are remote.

    A name of no kind is "folder", which then raises the error.

    Raises:
        UserError: files do not exist or are of several kinds, or a folder could be of two kinds.
    """
    files = expand(name)
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):
        kinds = _in_folder(folder)
        if len(kinds) > 1:
            either = " and ".join(SOURCES[kind].what for kind in kinds)
            raise UserError(
                f"data.source is {name!r}, which could be meant as {either}: name the files, or "
                "keep one kind"
            )
    else:
        kinds = _by_suffix(files, SOURCES)
        if len(kinds) != 1 or files not in kinds.values():
            if len(files) > 1:
                raise UserError(
                    f"data.source is {name!r}, which names files of several kinds, or of none: "
                    f"{accepted()}"
                )
            kinds = {}
    kind, files = next(iter(kinds.items()), ("folder", []))
    check_regular(f"data.source is {name!r}", *files)
    return kind, files


def _shards(name: str, paths: list[str], in_folder: bool) -> list[str]:
    """Choose the files of a name of the hub that are to be fetched.

    Args:
        in_folder: whether the name is that of a folder, which may hold others too.

    Raises:
        UserError: they are of several kinds or of none, or a package that reads them is missing.
    """
    by_path = dict(zip(map(Path, paths), paths, strict=True))
    by_kind = _alone(list(by_path))
    kind, files = next(iter(by_kind.items()), ("", []))
    if len(by_kind) != 1 or not (in_folder or len(files) == len(paths)):
        raise UserError(
            f"data.source is {name!r}, which names files of several kinds, or of none: accepted "
            f"of the hub are {SOURCES['tars'].what}; {SOURCES['parquet'].what}"
        )
    _check_package(name, kind)
    return list(map(by_path.__getitem__, files))


def _in_folder(folder: Path) -> dict[str, list[Path]]:
    """The kinds that a folder can be, each with those of its files that belong to it."""
    by_kind: dict[str, list[Path]] = {}
    for kind, entry in SOURCES.items():
        if any(os.path.exists(folder / file) for file in entry.holds):
            by_kind[kind] = []
    if by_kind:
        return by_kind
    inside: list[Path] = []
    # A folder without permission is reported when it is opened.
    with suppress(OSError), os.scandir(folder) as entries:
        inside = sorted(map(Path, filterfalse(os.DirEntry.is_dir, entries)))
    return _alone(inside)


def _alone(files: list[Path]) -> dict[str, list[Path]]:
    """The kinds of which a folder may hold files alone, each with its files."""
    by_kind = _by_suffix(files, {k: entry for k, entry in SOURCES.items() if entry.in_folder})
    for kind, files in list(by_kind.items()):
        companion = SOURCES[kind].companion
        beside = {path.stem for path in by_kind.get(companion, [])}
        if beside and beside <= {path.stem for path in files}:
            del by_kind[companion]
    return by_kind


def _by_suffix(files: list[Path], entries: Mapping[str, SourceEntry]) -> dict[str, list[Path]]:
    """The files of each kind that has some."""
    by_kind = {}
    for kind, entry in entries.items():
        some = [file for file in files if file.name.lower().endswith(entry.ends)]
        if some:
            by_kind[kind] = some
    return by_kind


def accepted() -> str:
    """The kinds that `--data` accepts, as the end of an error message."""
    return f"accepted are 'demo' and {'; '.join(entry.what for entry in SOURCES.values())}"


def expand(pattern: str) -> list[Path]:
    """The files that a name stands for, in order.

    `{00000..00019}` and `{a,b}` are expanded, `*`, `?` and `[]` matched. A name without a pattern
    is returned even if it does not exist.

    Files of the hub are fetched, where they are missing, and their copies are returned.

    Raises:
        UserError: some files of a pattern do not exist, no file matches, or files of the hub
            cannot be fetched.
    """
    if pattern.startswith("pipe:"):
        raise UserError(f"data.source is {pattern!r}, a command: download what it gives first")
    if is_remote(pattern):
        return local_copies(pattern, partial(_shards, pattern))
    path = os.path.expanduser(pattern)
    if os.path.exists(path) or not ("{" in path or WILDCARD.search(path)):
        return [Path(path)]
    files: list[Path] = []
    for name in braces(path):
        names = sorted(glob.glob(name)) if WILDCARD.search(name) else [name]
        files += map(Path, names)
    missing = list(filterfalse(os.path.isfile, files))
    check_there(pattern, files, missing)
    return files


def part_of(file: Path) -> str | None:
    """The part that a name such as `train-00000-of-00002.parquet` tells, if it tells one."""
    prefix = re.match(r"([a-z]+)[-_.]", file.name)
    return SPLITS.get(prefix[1]) if prefix else None
