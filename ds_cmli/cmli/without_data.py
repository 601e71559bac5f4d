"""What a backend computes on tensors without data: it allocates as ever, and starts no kernel.

A mode that runs a backend's own operators sees every buffer. What a backend reads from the tensors
otherwise, or from a GPU, is assumed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from torch._subclasses.fake_tensor import FakeTensor


class Assumed(NamedTuple):
    """What is assumed of a call."""

    # The valid tokens of each text and, where images have a mask, the valid patches of each image.
    lengths: list[int]
    any_lengths: bool  # whether chunks are as large as any lengths make them
    device: str  # its type, which that of tensors without data need not be
    # Of a GPU: compute capability, and bytes of shared memory of a block; None: the current one's.
    limits: tuple[tuple[int, int], int] | None = None


_assumed: ContextVar[Assumed | None] = ContextVar("assumed", default=None)


def assumed() -> Assumed | None:
    """What is assumed; None where tensors have data."""
    return _assumed.get()


@contextmanager
def assuming(values: Assumed) -> Iterator[None]:
    """Inside, backends get tensors without data, of which this is assumed."""
    token = _assumed.set(values)
    try:
        yield
    finally:
        _assumed.reset(token)


def has_data(x: object) -> bool:
    return not isinstance(x, FakeTensor)
