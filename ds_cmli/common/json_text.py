"""Reads JSON that anyone may have written or damaged; errors are of one kind."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

JsonObject = dict[str, Any]
Section = Mapping[str, Any]  # a part of a JSON that is only read
Kind = TypeVar("Kind")
DEEPEST = 100  # levels of lists and objects; at about 1,000 Python's recursion ends
LONGEST = 300  # digits of an integer; one of 309 exceeds every float
SHOWN = 200  # characters of a key or number in a message
KINDS = {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}


def parse(text: str | bytes, kind: type[Kind], finite: bool = False) -> Kind:
    """Parse JSON; a key that an object has twice is an error, as its first value would be lost.

    Args:
        text: bytes may be UTF-8, -16 or -32, with a byte order mark or without.
        kind: the type that the value must have: `dict`, `list`, or `object` for any.
        finite: refuse NaN and infinite numbers.

    Raises:
        ValueError: with one line that says what is wrong.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode(json.detect_encoding(text))
        value = (_FINITE if finite else _ANY).decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if text.count("[") + text.count("{") > DEEPEST:
        _check_depth(value)
    if not isinstance(value, kind):
        name = KINDS.get(type(value), "a number" if value is not None else "null")
        raise ValueError(f"{name} where {KINDS[kind]} is needed")
    return value


def read(path: Path, kind: type[Kind], finite: bool = False) -> Kind:
    """Parse a file as `parse` does; raises `OSError` too, and `ValueError` for a pipe or a device.

    These could block for ever, or have no end.
    """
    if path.exists() and not path.is_file():
        raise ValueError("no regular file")
    return parse(path.read_bytes(), kind, finite)


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(DEEPEST):
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
            elif isinstance(item, list):
                below += item
        if not below:
            return
        level = below
    raise ValueError("nested too deeply")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"has {max(keys, key=keys.count)[:SHOWN]!r} twice: keep one")
    return values


def _integer(text: str) -> int:
    if len(text) > LONGEST:
        raise ValueError(f"has a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _not_finite(text[:SHOWN])
    return value


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"has the number {text}: give a finite one")


_ANY = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer)
_FINITE = json.JSONDecoder(
    object_pairs_hook=_unique,
    parse_int=_integer,
    parse_float=_finite,
    parse_constant=_not_finite,
)
