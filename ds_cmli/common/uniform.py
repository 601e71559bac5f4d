"""Loops in which each turn allocates, frees and sends as much as the others, whatever it computes with."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def turns(items: Sequence[Item]) -> Iterable[Item]:
    """Returns the items. A prediction of memory replaces this function, and leaves out turns in the middle."""
    return items
