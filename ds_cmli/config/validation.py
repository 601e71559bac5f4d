"""Checks of values by pydantic, and one-line errors that name the setting, its value and what is accepted."""

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError

from ds_cmli.common.errors import UserError, nearest

MOST = 10**9  # the maximum of all counts
MOST_LAYERS, MOST_CHANNELS = 1000, 10**6  # of a model that a library builds from overrides
SHOWN = 200  # the maximum number of characters of a value in a message
TYPES = {
    "integer": "int",
    "number": "float",
    "string": "str",
    "boolean": "bool",
    "object": "dict",
    "array": "list",
}
OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "too_short")


def check(ok: bool, setting: str, value: object, need: str) -> None:
    """Raise a one-line `UserError` for the setting unless `ok`; `need` says what to give."""
    if not ok:
        raise UserError(f"{setting} is {shown(value)}: {need}")


def check_sizes(setting: str, overrides: Mapping[str, object]) -> None:
    """Raise `UserError` for a number in a model's overrides of which the library would build until memory ends."""
    for name, value in overrides.items():
        layers = any(word in name for word in ("depth", "layer", "block"))
        most = MOST_LAYERS if layers else MOST_CHANNELS
        for size in value if isinstance(value, list | tuple) else [value]:
            small = not isinstance(size, int) or abs(size) <= most
            check(small, f"{setting}.{name}", size, f"give at most {most}")


def choice(setting: str, value: object, known) -> None:
    if value not in known:
        raise UserError(f"{setting} is {shown(value)}: {nearest(str(value), known)}")


def shown(value: object) -> str:
    text = repr(value)
    return (
        text
        if len(text) <= SHOWN
        else f"{text[: SHOWN // 2]} ... {text[-20:]} ({len(text)} characters)"
    )


def build(section: type, name: str, values: Any, written: Mapping[str, str]) -> Any:
    """Build `section(**values)`, a pydantic dataclass whose fields are the settings `name.FIELD`.

    Args:
        written: the names by which the user gave settings, if they differ: `{"optim.lr": "--lr"}`.

    Raises:
        UserError: for the first wrong name or value.
    """
    check(isinstance(values, dict), name, values, "give a value of type dict")
    try:
        return section(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    key, *inner = first["loc"]
    node = TypeAdapter(section).json_schema()
    if first["type"] == "unexpected_keyword_argument":
        choice(f"setting of {name}", key, node["properties"])
    setting = written.get(f"{name}.{key}", f"{name}.{key}")
    node, given = node["properties"][key], first["input"]
    if "[key]" in inner:  # the key of a dict is wrong, and pydantic puts it in the location
        node, given, inner = node["propertyNames"], inner[0], []
    elif first["type"] == "missing":  # a list is too short
        given, inner = values[key], []
    if "anyOf" in node and inner:  # pydantic's error is only about the first alternative
        given, inner = values[key], []
    for part in inner:
        if isinstance(part, int):
            node = node["prefixItems"][part] if "prefixItems" in node else node["items"]
        else:
            node = node["additionalProperties"]
    setting = (" " if setting.startswith("--") else ".").join([setting, *map(str, inner)])
    if isinstance(given, str) and "enum" in node:
        choice(setting, given, node["enum"])
    raise UserError(f"{setting} is {shown(given)}: give {_accepted(node, first['type'])}")


def _accepted(node: dict[str, Any], error: str) -> str:
    """What a field accepts, from its JSON schema; only the range, if the value is merely out of range."""
    if "anyOf" in node:
        return " or ".join(
            _accepted(option, error) for option in node["anyOf"] if option.get("type") != "null"
        )
    if "enum" in node:
        return f"one of {', '.join(map(str, node['enum']))}"
    if "propertyNames" in node:
        known = ", ".join(node["propertyNames"]["enum"])
        return (
            f"at least one of {known}"
            if error == "too_short"
            else f"a value of type dict, of {known}"
        )
    if "prefixItems" in node:
        return f"a list of {len(node['prefixItems'])}, each {_accepted(node['prefixItems'][0], '')}"
    parts = [f"a value of type {TYPES[node['type']]}"] if error not in OUT_OF_RANGE else []
    if error == "finite_number":
        parts = ["a finite number"]
    if "maxLength" in node:
        parts.append(f"{node.get('minLength', 0)} to {node['maxLength']} characters without NUL")
    low, high = node.get("minimum"), node.get("maximum")
    lowest = f"{low}" if low is not None else "more than 0" if "exclusiveMinimum" in node else ""
    # The limit of counts is named only when it is exceeded.
    most = f"{high}" if high not in (None, MOST) or error == "less_than_equal" else ""
    most = f"below {node['exclusiveMaximum']}" if "exclusiveMaximum" in node else most
    if lowest and most:
        parts.append(f"{lowest} to {most}")
    elif lowest:
        parts.append(lowest if low is None else f"at least {lowest}")
    return ", ".join(parts) + (f" ({node['description']})" if "description" in node else "")


def parse_json(text: str) -> Any:
    """Parse strict JSON: no duplicate keys, no NaN or infinity, and no nesting or number that is too much for Python.

    Raises:
        ValueError: one line that says what is wrong.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_no_duplicates, parse_constant=_not_finite, parse_float=_finite
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"has {twice!r} twice: keep one")
    return out


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"has the number {text}: give a finite one")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _not_finite(text[:SHOWN])
    return value
