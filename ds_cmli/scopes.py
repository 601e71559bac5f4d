"""Named parts of a training step. The recorder of memory subscribes to them.

Without a subscriber nothing happens.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Subscriber = Callable[[str], AbstractContextManager[object]]
_subscriber: Subscriber = nullcontext


def scope(name: str) -> AbstractContextManager[object]:
    """Mark what runs inside as the part `name` of training.

    "backward" and "optimizer" are phases of a step. "exchange" is the exchange of texts, or of
    their gradients, between ranks. Other names are categories of memory reports.
    """
    return _subscriber(name)


@contextmanager
def subscribed(subscriber: Subscriber) -> Iterator[None]:
    """Enter `subscriber(name)` with every scope that is entered inside."""
    global _subscriber
    previous = _subscriber
    _subscriber = subscriber
    try:
        yield
    finally:
        _subscriber = previous
