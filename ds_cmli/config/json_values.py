"""The kinds of values in a DeepSpeed JSON: each is a function that checks a value and says what to give instead."""

import math
from collections.abc import Callable
from typing import Any

Kind = Callable[
    [Any], str | None
]  # returns what to give instead of the value, or None if the value is fine

LARGEST = 1e30  # larger numbers overflow in fp32 as soon as they are multiplied


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def boolean(value: Any) -> str | None:
    return None if isinstance(value, bool) else "give true or false"


def integer(least: int = 0, most: int = 2**53) -> Kind:
    """A whole number, which may be written as 5e7."""

    def kind(value: Any) -> str | None:
        if _is_number(value) and least <= value <= most and value == int(value):
            return None
        bounds = f"whole number from {least}" + (f" to {most}" if most < 2**53 else "")
        return "give a " + ("positive whole number" if least == 1 else bounds)

    return kind


def number(least: float = -math.inf, below: float = math.inf, above: bool = False) -> Kind:
    """A finite number that is at least `least` (with `above`: greater than `least`) and below `below`."""

    def kind(value: Any) -> str | None:
        if (
            _is_number(value)
            and abs(value) < LARGEST
            and least <= value < below
            and not (above and value == least)
        ):
            return None
        if _is_number(value) and LARGEST <= abs(value) < math.inf:
            return f"give a number below {LARGEST:g}, whose products are finite in fp32"
        bounds = (
            ""
            if least == -math.inf
            else f" above {least:g}"
            if above
            else f" of at least {least:g}"
        )
        return f"give a finite number{bounds}" + (
            "" if below == math.inf else f" and below {below:g}"
        )

    return kind


def one_of(*known: Any) -> Kind:
    def kind(value: Any) -> str | None:
        fits = any(value == k and type(value) is type(k) for k in known)
        shown = ", ".join(
            "null" if k is None else f'"{k}"' if isinstance(k, str) else str(k).lower()
            for k in known
        )
        return None if fits else f"give {'one of ' if len(known) > 1 else ''}{shown}"

    return kind


def text(value: Any) -> str | None:
    return None if isinstance(value, str) else "give a text"


def texts(value: Any) -> str | None:
    return (
        None
        if isinstance(value, list) and all(isinstance(v, str) for v in value)
        else "give a list of texts"
    )


def numbers(count: int | None = None, each: Kind | None = None) -> Kind:
    each = each or number()

    def kind(value: Any) -> str | None:
        if (
            isinstance(value, list)
            and value
            and count in (None, len(value))
            and not any(each(v) for v in value)
        ):
            return None
        return f"give a list of {count or 'some'} numbers" + (
            ": " + str(each(None)) if each(None) else ""
        )

    return kind


def optional(kind: Kind) -> Kind:
    return lambda value: None if value is None else kind(value)


def either(*kinds: Kind) -> Kind:
    return lambda value: None if any(kind(value) is None for kind in kinds) else kinds[0](value)


def refused(why: str, *harmless: Any) -> Kind:
    """A key that has no effect here or would do harm; only `harmless` values, which request nothing, are accepted."""

    def kind(value: Any) -> str | None:
        return None if any(value == h and type(value) is type(h) for h in harmless) else why

    return kind


def no_effect(why: str, *harmless: Any) -> Kind:
    return refused(
        f"it has no effect here ({why}): remove it", *(harmless or (False, {}, {"enabled": False}))
    )
