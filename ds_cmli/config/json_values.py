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


def _same(value: object, known: object) -> bool:
    return value == known and type(value) is type(known)  # 1 is not true, and 1.0 is not 1


def boolean(value: object) -> str | None:
    return None if isinstance(value, bool) else "give true or false"


def integer(least: int = 0, most: int = 2**53) -> Kind:
    """A whole number, which may be written as 5e7."""
    need = "give a positive whole number"
    if least != 1:
        need = f"give a whole number from {least}" + (f" to {most}" if most < 2**53 else "")

    def kind(value: object) -> str | None:
        fits = _is_number(value) and least <= value <= most and value == int(value)
        return None if fits else need

    return kind


def number(least: float = -math.inf, below: float = math.inf, above: bool = False) -> Kind:
    """A finite number of at least `least` (with `above`: greater) and below `below`."""
    need = "give a finite number"
    if least > -math.inf:
        need += f" above {least:g}" if above else f" of at least {least:g}"
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


def _in_json(value: object) -> str:
    if value is None:
        return "null"
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def one_of(*known: object) -> Kind:
    need = "give " + ("one of " if len(known) > 1 else "") + ", ".join(map(_in_json, known))
    return refused(need, *known)


def text(value: object) -> str | None:
    return None if isinstance(value, str) else "give a text"


def texts(value: object) -> str | None:
    fits = isinstance(value, list) and all(isinstance(v, str) for v in value)
    return None if fits else "give a list of texts"


def numbers(count: int | None, each: Kind) -> Kind:
    """A list of `count` numbers, or of some if it is None."""
    need = f"give a list of {count or 'some'} numbers: {each(None)}"

    def kind(value: object) -> str | None:
        if not isinstance(value, list) or not value or count not in (None, len(value)):
            return need
        return need if any(map(each, value)) else None

    return kind


def optional(kind: Kind) -> Kind:
    return lambda value: None if value is None else kind(value)


def either(*kinds: Kind) -> Kind:
    return lambda value: None if any(kind(value) is None for kind in kinds) else kinds[0](value)


def refused(why: str, *harmless: object) -> Kind:
    """A key that is idle here or would do harm; `harmless` values, which ask nothing, pass."""
    return lambda value: None if any(_same(value, known) for known in harmless) else why


def no_effect(why: str, *harmless: object) -> Kind:
    harmless = harmless or (False, {}, {"enabled": False})
    return refused(f"it has no effect here ({why}): remove it", *harmless)
