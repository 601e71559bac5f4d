"""What training reports while it runs: the only place where prediction reaches into it.

Training calls the methods of `probe`, the head of a chain of subscribers. With no subscriber they
do what training does, which is almost nothing. The memory tracker, the meter of the speed and the
counter of traffic subscribe to the events. The prediction of memory, whose tensors hold no data,
also answers the questions below in another way: it calls a function for fewer micro-batches, and
makes a copy where a tensor would move to another device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:  # train.py imports this before it imports torch
    import torch
    from torch import Tensor

Returned = TypeVar("Returned")


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

    # --- events

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

    # --- questions that a prediction answers in another way

    def alike(self, function: Callable[..., Returned], *arguments: object) -> Returned:
        """Call a function that each micro-batch of a step calls once, with the same amounts."""
        if self.below is None:
            return function(*arguments)
        return self.below.alike(function, *arguments)

    def to_device(
        self, x: Tensor, device: torch.device | str, non_blocking: bool = False
    ) -> Tensor:
        """Move a tensor from the host to the device that trains."""
        if self.below is None:
            return x.to(device, non_blocking=non_blocking)
        return self.below.to_device(x, device, non_blocking)

    def on_gpu(self, device: torch.device) -> bool:
        """Tell whether tensors of this device are on a GPU."""
        if self.below is None:
            return device.type == "cuda"
        return self.below.on_gpu(device)


probe = Probe()
