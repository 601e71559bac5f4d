"""Reads what PyTorch's CPU allocator reports to the profiler. Nothing else in this package reads these events."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def recording_in_parts(
    mark: str = MEMORY,
) -> Iterator[tuple[list[tuple[str, int]], Callable[[], None]]]:
    """Records the allocator's events into a list, and those whose name begins with `mark`; see `events`.

    Yields the list and a function that moves the events recorded so far into it; the rest follows at the end. A
    profiler keeps more than a kilobyte for each event, and a long step has more of them than fit in memory. No other
    thread may run an operator while that function is called.
    """
    found: list[tuple[str, int]] = []
    profilers = [recording()]

    def keep(profiler: Any) -> None:
        found.extend(
            event for event in events(profiler) if event[0] == MEMORY or event[0].startswith(mark)
        )
        profiler.profiler.kineto_results = (
            None  # freed now: a profiler is part of a reference cycle
        )

    def move() -> None:
        # Nothing may be allocated or freed between the two profilers.
        ended = profilers.pop()
        ended.__exit__(None, None, None)
        profilers.append(recording())
        profilers[0].__enter__()
        keep(ended)

    profilers[0].__enter__()
    try:
        yield found, move
    finally:
        profilers[0].__exit__(None, None, None)
        keep(profilers.pop())


def sizes(call: Callable[[], object]) -> list[int]:
    """The bytes of each allocation (positive) and each free (negative) that `call` makes, in order."""
    with recording() as profiler:
        call()
    return [size for name, size in events(profiler) if name == MEMORY]
