"""What training reports while it runs: the one place where measuring reaches into it.

The recorder of memory subscribes. Without a subscriber nothing happens.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Subscriber = Callable[[str], AbstractContextManager[object]]
_subscriber: Subscriber = nullcontext


def scope(name: str) -> AbstractContextManager[object]:
    """What is inside is a part of training.

    "backward" and "optimizer" are phases of a step. "exchange" is that of texts, or of their
    gradients, between ranks. Others are categories of memory reports.
    """
    return _subscriber(name)


@contextmanager
def subscribed(subscriber: Subscriber) -> Iterator[None]:
    """Inside, `subscriber(name)` is entered with every scope."""
    global _subscriber
    before, _subscriber = _subscriber, subscriber
    try:
        yield
    finally:
        _subscriber = before
