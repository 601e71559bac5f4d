"""Reads what PyTorch's CPU allocator reports to the profiler. Nothing else in this package reads these events."""

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

MEMORY = "[memory]"  # the profiler's name of an allocation and of a free


def recording() -> Any:
    """A profiler that records the allocator's events while it is entered as a context manager."""
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def events(profiler: Any) -> list[tuple[str, int]]:
    """(name, bytes) of every event that a finished profiler has recorded, in the order of their start times.

    Allocations have the name `MEMORY` and positive bytes, frees the same name and negative bytes.
    """
    recorded = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    return [(e.name(), e.nbytes()) for e in recorded]


def sizes(call: Callable[[], object]) -> list[int]:
    """The bytes of each allocation (positive) and each free (negative) that `call` makes, in order."""
    with recording() as profiler:
        call()
    return [size for name, size in events(profiler) if name == MEMORY]
