"""Parsing of `--data`: weights, and patterns of file names."""

import glob
import os
import re
from pathlib import Path

from ds_cmli.common.errors import UserError

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
MOST_FILES = 100_000
# Names of the parts of a data set.
SPLITS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}


def weighted(sources: str | list[str]) -> tuple[list[str], list[float] | None]:
    """Split names and weights: `["a::0.7", "b::0.3"]` -> `(["a", "b"], [0.7, 0.3])`; None instead of no weights.

    Raises:
        UserError: a weight is not a positive number or only some sources have one, a name occurs twice, or "demo" is
            mixed with other sources.
    """
    sources = [sources] if isinstance(sources, str) else sources
    names, weights = [], []
    for source in sources:
        name, mark, weight = source.rpartition("::")
        if mark:
            try:
                weights.append(float(weight))
            except ValueError:
                weights.append(0.0)
            if not 0 < weights[-1] < float("inf"):
                raise UserError(
                    f"--data is {source!r}: write WHAT::WEIGHT with a number above 0, for instance {name}::0.7"
                )
        names.append(name if mark else source)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--data names {twice!r} twice: keep one")
    if len(names) > 1 and "demo" in names:
        raise UserError(
            f"--data mixes 'demo' with {names[names.index('demo') - 1]!r}: the demo stands alone"
        )
    if weights and len(names) == 1:
        raise UserError(f"--data is {sources[0]!r}, the only source: leave its weight out")
    if weights and len(weights) < len(names):
        raise UserError(
            f"--data gives {len(weights)} of {len(names)} sources a weight: give all one, or none"
        )
    return names, weights or None


def expand(pattern: str) -> list[Path]:
    """The files that a name stands for, in order: `{00000..00019}` and `{a,b}` are expanded, `*`, `?` and `[]` matched.

    A name without a pattern is returned even if it does not exist.

    Raises:
        UserError: the name is a URL, some files of a pattern do not exist, or no file matches.
    """
    if re.match(r"(pipe:|[a-z0-9]+://)", pattern):
        raise UserError(
            f"data.source is {pattern!r}, which is not on this machine: download it first"
        )
    path = os.path.expanduser(pattern)
    if os.path.exists(path) or not re.search(r"[{*?\[]", path):
        return [Path(path)]
    names = _braces(path)
    files = [
        Path(f)
        for name in names
        for f in (sorted(glob.glob(name)) if re.search(r"[*?\[]", name) else [name])
    ]
    missing = [file for file in files if not os.path.isfile(file)]
    if not files:
        raise UserError(f"data.source is {pattern!r}: no file matches it")
    if missing:
        lacking = (
            f"{len(missing)} of {len(files)} files do not exist, the first {str(missing[0])!r}"
        )
        raise UserError(f"data.source is {pattern!r}: {lacking}")
    return files


def part_of(file: Path) -> str | None:
    """The part that a name such as `train-00000-of-00002.parquet` tells; None if it tells none of `SPLITS`."""
    found = re.match(r"([a-z]+)[-_.]", file.name)
    return SPLITS.get(found[1]) if found else None


def _braces(pattern: str) -> list[str]:
    found = BRACES.search(pattern)
    if found is None:
        return [pattern]
    span = RANGE.fullmatch(found[1])
    if span:
        first, last = int(span[1]), int(span[2])
        if abs(last - first) >= MOST_FILES:
            raise UserError(f"data.source is {pattern!r}: more than {MOST_FILES:,} files")
        step = 1 if last >= first else -1
        width = len(span[1]) if span[1].startswith("0") else 0
        parts = [str(number).zfill(width) for number in range(first, last + step, step)]
    else:
        parts = found[1].split(",")
    return [
        name
        for part in parts
        for name in _braces(pattern[: found.start()] + part + pattern[found.end() :])
    ]
