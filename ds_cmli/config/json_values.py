"""Types of the values in a DeepSpeed JSON, which pydantic checks strictly: nothing is converted."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainValidator

JsonObject = dict[str, Any]
Section = Mapping[str, Any]  # a part of the JSON that is only read
Kind = Any  # a type that pydantic knows

LARGEST = 1e30  # larger numbers overflow in fp32 as soon as they are multiplied


def _whole(value: object) -> object:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def integer(least: int = 0, most: int = 2**53) -> Kind:
    """A whole number, which may be written as 5e7."""
    return Annotated[int, Field(ge=least, le=most), BeforeValidator(_whole)]


def number(least: float = -LARGEST, below: float = LARGEST, above: bool = False) -> Kind:
    """A finite number of at least `least` (with `above`: greater) and below `below`."""
    return Annotated[float, Field(gt=least if above else -LARGEST, ge=least, lt=below)]


def numbers(count: int | None, each: Kind) -> Kind:
    """A list of `count` numbers, or of some if it is None."""
    return Annotated[list[each], Field(min_length=count or 1, max_length=count)]


def one_of(*known: object) -> Kind:
    one = "one of " if len(known) > 1 else ""
    return refused(f"give {one}{', '.join(map(json.dumps, known))}", *known)


def refused(why: str, *harmless: object) -> Kind:
    """A key that is idle here or would do harm; `harmless` values, which ask nothing, pass."""

    def check(value: object) -> object:
        # 1 is not true, and 1.0 is not 1.
        if not any(value == known and type(value) is type(known) for known in harmless):
            raise ValueError(why)
        return value

    return Annotated[Any, PlainValidator(check)]


def no_effect(why: str, *harmless: object) -> Kind:
    harmless = harmless or (False, {}, {"enabled": False})
    return refused(f"it has no effect here ({why}): remove it", *harmless)
