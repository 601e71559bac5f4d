"""Reads JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

JsonObject = dict[str, Any]
Section = Mapping[str, Any]  # a part of a JSON that is only read
Kind = TypeVar("Kind")


def parse(text: str | bytes, kind: type[Kind]) -> Kind:
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, kind):
        raise ValueError(f"no JSON {kind.__name__}")
    return value


def read(path: Path, kind: type[Kind]) -> Kind:
    return parse(path.read_bytes(), kind)
