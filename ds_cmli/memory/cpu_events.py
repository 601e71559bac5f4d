"""The one reader of what PyTorch's CPU allocator reports to the profiler."""

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

MEMORY = "[memory]"  # the profiler's name for an allocation or its end


def recording() -> Any:
    """A profiler, to be entered, that records the allocator's events."""
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def events(profiler: Any) -> list[tuple[str, int]]:
    """(name, bytes) of everything that an ended profiler recorded, in its order.

    Allocations have the name `MEMORY` and positive bytes, their ends the same name and negative bytes.
    """
    recorded = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    return [(e.name(), e.nbytes()) for e in recorded]


def sizes(call: Callable[[], object]) -> list[int]:
    """Signed bytes of the allocations that `call` makes, and of their ends, in order."""
    with recording() as profiler:
        call()
    return [size for name, size in events(profiler) if name == MEMORY]
