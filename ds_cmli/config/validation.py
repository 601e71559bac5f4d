"""Checks of values by pydantic, and one-line errors that name setting, value and remedy."""

from collections.abc import Collection, Mapping
from typing import TypeVar

from pydantic import (
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import PydanticCustomError, core_schema

from ds_cmli.common.errors import UserError, nearest

MOST = 10**9  # the maximum of all counts
MOST_LAYERS, MOST_CHANNELS = 1000, 10**6  # of a model that a library builds from overrides
SHOWN = 200  # the maximum number of characters of a value in a message
NOT_REGISTERED = "not_registered"  # pydantic's name of the error of `NameOf`
SectionType = TypeVar("SectionType")  # a section of them


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
        known = [*self.more, *self.table]
        if name not in known:
            hint = nearest(name, known)
            link = " Or" if hint.endswith("?") else "; or"
            hint += f"{link} give the --plugin that registers it"
            raise PydanticCustomError(NOT_REGISTERED, "{hint}", {"hint": hint})
        return name

    def __get_pydantic_core_schema__(
        self, source: type, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, object]:
        return {"type": "string", "enum": [*self.more, *self.table]}


def build(
    section: type[SectionType], name: str, values: object, written: Mapping[str, str]
) -> SectionType:
    """Build `section(**values)`, a pydantic dataclass whose fields are the settings `name.FIELD`.

    Args:
        written: the names by which the user gave settings, if they differ: `{"optim.lr": "--lr"}`.

    Raises:
        UserError: for the first wrong name or value.
    """
    if not isinstance(values, dict):
        raise UserError(f"{name} is {shown(values)}: Input should be a valid dictionary")
    try:
        return section(**values)
    except ValidationError as error:
        errors = error.errors(include_url=False)
    key, kind = errors[0]["loc"][0], errors[0]["type"]
    fields = TypeAdapter(section).json_schema()["properties"]
    if kind == "unexpected_keyword_argument":
        choice(f"setting of {name}", key, fields)
    if kind == "missing" and errors[0]["loc"] == (key,):
        raise UserError(f"{name}.{key} is missing: give it")
    needs: dict[str, None] = {}  # a setting of several types has an error for each of them
    for problem in errors:
        if problem["loc"][0] == key:
            needs[problem["msg"]] = None
    line = f"{written.get(f'{name}.{key}', f'{name}.{key}')} is {shown(values[key])}: "
    line += " or: ".join(needs)
    if "description" in fields[key]:
        line += f" ({fields[key]['description']})"
    raise (NotRegistered if kind == NOT_REGISTERED else UserError)(line)
