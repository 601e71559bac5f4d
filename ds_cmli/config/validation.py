"""Checks of values by pydantic, and one-line errors that name setting, value and remedy."""

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import core_schema

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
Json = Any  # a value of JSON
Node = dict[str, Json]  # a part of a JSON schema
Section = TypeVar("Section")
OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "too_short")


def check(ok: bool, setting: str, value: object, need: str) -> None:
    """Raise a one-line `UserError` for the setting unless `ok`; `need` says what to give."""
    if not ok:
        raise UserError(f"{setting} is {shown(value)}: {need}")


def check_sizes(setting: str, overrides: Mapping[str, object]) -> None:
    """Raise `UserError` for a size of which a library would build until memory ends."""
    for name, value in overrides.items():
        layers = any(word in name for word in ("depth", "layer", "block"))
        most = MOST_LAYERS if layers else MOST_CHANNELS
        for size in value if isinstance(value, list | tuple) else [value]:
            small = not isinstance(size, int) or abs(size) <= most
            check(small, f"{setting}.{name}", size, f"give at most {most}")


def choice(setting: str, value: object, known: Collection[object]) -> None:
    """Raise a one-line `UserError` for a value that is not known, with the nearest that is."""
    if value not in known:
        raise UserError(f"{setting} is {shown(value)}: {nearest(str(value), known)}")


def shown(value: object) -> str:
    """The value as a message shows it; a long one is shortened."""
    text = repr(value)
    if len(text) <= SHOWN:
        return text
    return f"{text[: SHOWN // 2]} ... {text[-20:]} ({len(text)} characters)"


class NotRegistered(UserError):
    """A name that no table has; a package that was not imported may register it."""


class NameOf:
    """Restricts a text to the names of a table, to which names may be added at any time."""

    def __init__(self, table: Mapping[str, object], *more: str):
        self.table, self.more = table, more

    def check(self, name: str) -> str:
        if name not in self.table and name not in self.more:
            raise ValueError(f"{name!r} is not in the table")  # `build` says it with the setting
        return name

    def __get_pydantic_core_schema__(
        self, source: type, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> Node:
        return {"type": "string", "enum": [*self.more, *self.table], "registered": True}


def build(section: type[Section], name: str, values: object, written: Mapping[str, str]) -> Section:
    """Build `section(**values)`, a pydantic dataclass whose fields are the settings `name.FIELD`.

    Args:
        written: the names by which the user gave settings, if they differ: `{"optim.lr": "--lr"}`.

    Raises:
        UserError: for the first wrong name or value.
    """
    if not isinstance(values, dict):
        raise UserError(f"{name} is {shown(values)}: give a value of type dict")
    try:
        return section(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    key, *inner = first["loc"]
    fields = TypeAdapter(section).json_schema()["properties"]
    if first["type"] == "unexpected_keyword_argument":
        choice(f"setting of {name}", key, fields)
    node, given = fields[key], first["input"]
    if "[key]" in inner:  # the key of a dict is wrong, and pydantic puts it in the location
        node, given, inner = node["propertyNames"], inner[0], []
    elif first["type"] == "missing" or "anyOf" in node:
        # A list is too short, or pydantic's error is only about the first alternative.
        given, inner = values[key], []
    for part in inner:
        node = _inside(node, part)
    setting = written.get(f"{name}.{key}", f"{name}.{key}")
    setting = (" " if setting.startswith("--") else ".").join([setting, *map(str, inner)])
    if isinstance(given, str) and "enum" in node:
        if "registered" in node:
            raise NotRegistered(f"{setting} is {shown(given)}: {nearest(given, node['enum'])}")
        choice(setting, given, node["enum"])
    raise UserError(f"{setting} is {shown(given)}: give {_accepted(node, first['type'])}")


def _inside(node: Node, part: int | str) -> Node:
    """The schema of an item of a list or dict."""
    if isinstance(part, str):
        return node["additionalProperties"]
    if "prefixItems" in node:
        return node["prefixItems"][part]
    return node["items"]


def _accepted(node: Node, error: str) -> str:
    """Say what a field accepts; only the range, if the value is merely out of range.

    Args:
        node: the field's JSON schema.
        error: pydantic's name of what is wrong.
    """
    if "anyOf" in node:
        options = [option for option in node["anyOf"] if option.get("type") != "null"]
        return " or ".join(_accepted(option, error) for option in options)
    if "enum" in node:
        return f"one of {', '.join(map(str, node['enum']))}"
    if "propertyNames" in node:
        known = ", ".join(node["propertyNames"]["enum"])
        one = error == "too_short"
        if one:
            return f"at least one of {known}"
        return f"a value of type dict, of {known}"
    if "prefixItems" in node:
        return f"a list of {len(node['prefixItems'])}, each {_accepted(node['prefixItems'][0], '')}"
    parts = []
    if error == "finite_number":
        parts.append("a finite number")
    elif error not in OUT_OF_RANGE:
        parts.append(f"a value of type {TYPES[node['type']]}")
    if "maxLength" in node:
        least = node.get("minLength", 0)
        parts.append(f"{least} to {node['maxLength']} characters without NUL")
    text = ", ".join(parts + _range(node, error))
    if "description" in node:
        return f"{text} ({node['description']})"
    return text


def _range(node: Node, error: str) -> list[str]:
    """The range of a number, as a list of no text or one."""
    most = ""
    if "exclusiveMaximum" in node:
        most = f"below {node['exclusiveMaximum']}"
    elif node.get("maximum") not in (None, MOST) or error == "less_than_equal":
        most = str(node["maximum"])  # the limit of counts is named only when it is exceeded
    if "minimum" in node:
        low = node["minimum"]
        return [f"{low} to {most}" if most else f"at least {low}"]
    if "exclusiveMinimum" in node:
        return [f"more than 0 to {most}" if most else "more than 0"]
    return []


def check_kind(name: str, value: object, kind: type[object]) -> None:
    """Raise a one-line `ValueError` for a value that is not of `kind`, a type that pydantic knows.

    Nothing is converted.
    """
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, (name, *first["loc"])))
        if first["type"] == "missing":
            raise ValueError(f"{where} is missing") from None
        raise ValueError(f"{where} is {shown(first['input'])}: {first['msg']}") from None
