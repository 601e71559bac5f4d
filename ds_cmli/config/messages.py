"""One line for each mistake in settings and in DeepSpeed's JSON: setting, value, remedy."""

from collections.abc import Collection, Mapping
from typing import Any

from ds_cmli.errors import UserError, nearest


def check(ok: bool, setting: str, value: object, remedy: str) -> None:
    """Raise a one-line `UserError` for the setting unless `ok`; `remedy` says what to give."""
    if not ok:
        raise UserError(f"{setting} is {value!r}: {remedy}")


def choice(setting: str, value: object, choices: Collection[object]) -> None:
    """Raise a one-line `UserError` for a value that is not known, with the nearest that is."""
    if value not in choices:
        raise UserError(f"{setting} is {value!r}: {nearest(str(value), choices)}")


def words(text: str) -> set[str]:
    # Not a literal's .split(), for which ruff wants a list with a line for each name.
    return set(text.split())


def setting_of_error(location: tuple[int | str, ...], content: Any) -> str:
    """Return the dotted name of the setting that one of pydantic's errors is about.

    pydantic appends names of types to the location of a value that may have several types.
    """
    names: list[str] = []
    for part in location:
        if isinstance(content, Mapping):
            content = content.get(part)
        elif isinstance(content, list) and isinstance(part, int):
            content = content[part]
        elif part == "[key]":
            content = None
        else:
            break
        names.append(str(part))
    return ".".join(names)
