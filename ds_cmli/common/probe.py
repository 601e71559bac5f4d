"""What training reports while it runs: the only place where prediction reaches into it.

Training calls the methods of `probe`, the head of a chain of subscribers. With no subscriber they
do nothing. The recorder of memory and the meter of the speed subscribe.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


class Probe:
    """A subscriber. What it does not override goes on to the previous subscriber."""

    below: Probe | None = None

    @contextmanager
    def subscribed(self, subscriber: Probe) -> Iterator[None]:
        """Inside, `subscriber` is called, before those that have subscribed earlier."""
        subscriber.below, self.below = self.below, subscriber
        try:
            yield
        finally:
            above = self
            while above.below is not subscriber:
                assert above.below is not None, "it is no longer subscribed"
                above = above.below
            above.below, subscriber.below = subscriber.below, None

    def scope(self, category: str) -> AbstractContextManager[object]:
        """Enter a context whose allocations belong to a category of a memory report."""
        if self.below is None:
            return nullcontext()
        return self.below.scope(category)

    def step_phase(self, name: str) -> AbstractContextManager[object]:
        """Enter a context that is a step's "backward" or "optimizer"."""
        if self.below is None:
            return nullcontext()
        return self.below.step_phase(name)

    def exchanging(self) -> AbstractContextManager[object]:
        """Enter a context that exchanges texts, or their gradients, between ranks."""
        if self.below is None:
            return nullcontext()
        return self.below.exchanging()

    def losses(self) -> AbstractContextManager[object]:
        """Enter a context that computes the losses of features."""
        if self.below is None:
            return nullcontext()
        return self.below.losses()


probe = Probe()
