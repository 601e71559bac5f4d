"""What training reports while it runs: the one place where measuring reaches into it.

The recorder of memory takes the place of `subscriber`. Without one nothing happens.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

subscriber: Callable[[str], AbstractContextManager[object]] = nullcontext


def scope(name: str) -> AbstractContextManager[object]:
    """What is inside is a part of training.

    "backward" and "optimizer" are phases of a step. "exchange" is that of texts, or of their
    gradients, between ranks. Others are categories of memory reports.
    """
    return subscriber(name)
