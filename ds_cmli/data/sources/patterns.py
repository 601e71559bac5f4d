"""Patterns of file names, and the listings that they are matched with.

`{00000..00019}` and `{a,b}` are expanded, `*`, `?` and `[]` matched.
"""

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from itertools import filterfalse
from typing import NamedTuple

from ds_cmli.common.errors import UserError

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
WILDCARD = re.compile(r"[*?\[]")
MOST_FILES = 100_000
Count = Callable[[int], None]  # called with each number of bytes that has come


class File(NamedTuple):
    path: str  # in the data set of the hub
    size: int  # bytes
    stamp: str = ""  # its SHA-256, or git's id of a small file, where the hub tells it


class Listing(NamedTuple):
    """What a name stands for."""

    files: dict[str, File]  # by path: those of the name, and perhaps others
    paths: list[str]  # of the files of the name, in order
    whole: bool  # whether it is the name of a folder, with all that is in it


def braces(pattern: str) -> list[str]:
    """The names that a pattern stands for; raises `UserError` for too many."""
    names, expanded = list[str](), [pattern]
    while names != expanded:
        names, expanded = expanded, []
        for name in names:
            expanded += _with_first_brace(name)
            if len(expanded) > MOST_FILES:
                raise UserError(f"data.source is {pattern!r}: more than {MOST_FILES:,} files")
    return names


def _with_first_brace(pattern: str) -> list[str]:
    """The names that a pattern becomes by its first brace without another inside."""
    brace = BRACES.search(pattern)
    if brace is None:
        return [pattern]
    parts = brace[1].split(",")
    span = RANGE.fullmatch(brace[1])
    if span:
        first, last = int(span[1]), int(span[2])
        if abs(last - first) >= MOST_FILES:
            return [pattern] * (MOST_FILES + 1)
        step = 1 if last >= first else -1
        width = len(span[1]) if span[1].startswith("0") else 0
        parts = [str(number).zfill(width) for number in range(first, last + step, step)]
    return [pattern[: brace.start()] + part + pattern[brace.end() :] for part in parts]


def named(source: str, pattern: str, names: Sequence[str]) -> list[str]:
    """Find those of the paths `names` that a pattern names, in order.

    As in `glob`, a wildcard does not match a slash.

    Args:
        source: what the user named, for messages.

    Raises:
        UserError: some files of a pattern are not among `names`, or none matches.
    """
    known = set(names)
    matching: list[str] = []
    for name in braces(pattern):
        if WILDCARD.search(name):
            depth = name.count("/")
            matching += sorted(n for n in names if n.count("/") == depth and fnmatchcase(n, name))
        else:
            matching.append(name)
    check_there(source, matching, list(filterfalse(known.__contains__, matching)))
    return matching


def check_there(source: str, files: Sequence[object], missing: Sequence[object]) -> None:
    """Raise `UserError` if a pattern names no file, or some of `files` are missing."""
    if not files:
        raise UserError(f"data.source is {source!r}: no file matches it")
    if missing:
        raise UserError(
            f"data.source is {source!r}: {len(missing)} of {len(files)} files do not exist, the "
            f"first {str(missing[0])!r}"
        )
