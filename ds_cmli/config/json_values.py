"""Kinds of values in a DeepSpeed JSON: each checks a value and says what to give instead of it."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

JsonObject = dict[str, Any]
Section = Mapping[str, Any]  # a part of the JSON that is only read
# Returns what to give instead of the value, or None if the value is fine.
Kind = Callable[[object], str | None]

LARGEST = 1e30  # larger numbers overflow in fp32 as soon as they are multiplied


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kind(need: str, fits: Callable[[Any], bool]) -> Kind:
    return lambda value: None if fits(value) else need


boolean = _kind("give true or false", lambda value: isinstance(value, bool))
text = _kind("give a text", lambda value: isinstance(value, str))
texts = _kind(
    "give a list of texts",
    lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value),
)


def integer(least: int = 0, most: int = 2**53) -> Kind:
    """A whole number, which may be written as 5e7."""
    need = f"give a whole number from {least}"
    if least == 1:
        need = "give a positive whole number"
    elif most < 2**53:
        need += f" to {most}"
    return _kind(need, lambda v: _is_number(v) and least <= v <= most and v == int(v))


def number(least: float = -math.inf, below: float = math.inf, above: bool = False) -> Kind:
    """A finite number of at least `least` (with `above`: greater) and below `below`."""
    need = "give a finite number"
    if above:
        need += f" above {least:g}"
    elif least > -math.inf:
        need += f" of at least {least:g}"
    if below < math.inf:
        need += f" and below {below:g}"

    def kind(value: object) -> str | None:
        if not _is_number(value):
            return need
        if LARGEST <= abs(value) < math.inf:
            return f"give a number below {LARGEST:g}, whose products are finite in fp32"
        fits = abs(value) < LARGEST and least <= value < below and not (above and value == least)
        return None if fits else need

    return kind


def numbers(count: int | None, each: Kind) -> Kind:
    """A list of `count` numbers, or of some if it is None."""

    def fits(value: object) -> bool:
        right_size = isinstance(value, list) and value and count in (None, len(value))
        return bool(right_size) and not any(map(each, value))  # type: ignore[call-overload]

    return _kind(f"give a list of {count or 'some'} numbers: {each(None)}", fits)


def one_of(*known: object) -> Kind:
    one = "one of " if len(known) > 1 else ""
    return refused(f"give {one}{', '.join(map(_in_json, known))}", *known)


def _in_json(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return f'"{value}"'
    return str(value).lower()


def refused(why: str, *harmless: object) -> Kind:
    """A key that is idle here or would do harm; `harmless` values, which ask nothing, pass."""
    # 1 is not true, and 1.0 is not 1.
    return _kind(why, lambda v: any(v == known and type(v) is type(known) for known in harmless))


def no_effect(why: str, *harmless: object) -> Kind:
    harmless = harmless or (False, {}, {"enabled": False})
    return refused(f"it has no effect here ({why}): remove it", *harmless)


def optional(kind: Kind) -> Kind:
    return lambda value: None if value is None else kind(value)


def either(*kinds: Kind) -> Kind:
    return lambda value: None if any(kind(value) is None for kind in kinds) else kinds[0](value)
