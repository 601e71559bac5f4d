"""Marks loops whose iterations all allocate, free and send the same amounts, whatever their values are."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def turns(items: Sequence[Item]) -> Iterable[Item]:
    """Returns the items. A memory prediction replaces this function by one that skips iterations in the middle."""
    return items
