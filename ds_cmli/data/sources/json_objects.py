"""Reading JSON in which a key that comes twice is a mistake: the former value would be lost without a word."""

import json
from typing import Any


def loads(text: str | bytes) -> Any:
    """As `json.loads`; a key that an object has twice is a `ValueError` too."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} twice in one object")
    return values
