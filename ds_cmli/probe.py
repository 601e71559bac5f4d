"""What training reports while it runs: the one place where measuring reaches into it.

The recorder of memory subscribes. Without a subscriber nothing happens.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

Subscriber = Callable[[str], AbstractContextManager[object]]
_subscribers: list[Subscriber] = []


@contextmanager
def subscribed(subscriber: Subscriber) -> Iterator[None]:
    """Inside, `subscriber(name)` is entered with every scope, after those subscribed earlier."""
    _subscribers.append(subscriber)
    try:
        yield
    finally:
        _subscribers.remove(subscriber)


@contextmanager
def scope(name: str) -> Iterator[None]:
    """What is inside is a part of training.

    "backward" and "optimizer" are phases of a step. "exchange" is that of texts, or of their
    gradients, between ranks. Others are categories of memory reports.
    """
    with ExitStack() as stack:
        for subscriber in _subscribers:
            stack.enter_context(subscriber(name))
        yield
