"""Reads what PyTorch's CPU allocator reports to the profiler.

Nothing else in this package reads these events.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from ds_cmli.common.patches import patched

# Seconds to wait at most until gloo's thread has released a collective's tensors; microseconds
# suffice.
LONGEST_S = 1.0
# Seconds to wait for gloo to release its internal copies, which have no count that could be read:
# 5 ms did not suffice on a busy machine.
COPY_S = 0.05
MEMORY = "[memory]"  # the profiler's name of an allocation and of a free


def recording() -> profile:
    """A profiler that records the allocator's events while it is entered as a context manager."""
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def events(profiler: profile) -> list[tuple[str, int]]:
    """(name, bytes) of every event of a finished profiler, in the order of their start times.

    Allocations have the name `MEMORY` and positive bytes, frees the same name and negative bytes.
    """
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    recorded = sorted(results.events(), key=lambda e: e.start_ns())  # type: ignore[union-attr]
    return [(e.name(), e.nbytes()) for e in recorded]


def sizes(call: Callable[[], object]) -> list[int]:
    """The bytes of each allocation (positive) and each free (negative) of `call`, in order."""
    with recording() as profiler:
        call()
    return [size for name, size in events(profiler) if name == MEMORY]


@contextmanager
def seen_by_the_profiler() -> Iterator[None]:
    """Inside, collectives return only after gloo's thread has released their tensors.

    gloo's thread does so a moment after the caller has gone on. A tensor that the caller has
    dropped by then is freed in that thread, which the profiler does not record, so it would be
    counted as if it were never freed.
    """
    with patched("torch: collectives", _to_the_end):
        yield


def _to_the_end(method: Callable) -> Callable:
    seconds = COPY_S if "reduce_scatter" in method.__name__ else 0.0

    def run(group: dist.ProcessGroup, *arguments: object) -> "_Work | None":
        tensors = [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]
        before = _uses(tensors)
        work = _Work(method(group, *arguments), tensors, before, seconds)
        if arguments[-1].asyncOp:  # type: ignore[attr-defined] # the operation's options
            return work
        work.wait()
        return None

    return run


def _uses(tensors: list[Tensor]) -> list[int]:
    """The number of references to each tensor from C++."""
    return [tensor._use_count() for tensor in tensors]  # type: ignore[attr-defined]


class _Work:
    """A `dist.Work` whose `wait` returns when only the caller holds its tensors, or `LONGEST_S`
    after its end."""

    def __init__(
        self, work: dist.Work | None, tensors: list[Tensor], before: list[int], seconds: float
    ):
        self.work, self.tensors, self.before, self.seconds = work, tensors, before, seconds

    def is_completed(self) -> bool:
        return self.work is None or self.work.is_completed()

    def wait(self, *timeout: object) -> bool:
        if self.work is not None:
            self.work.wait(*timeout)  # type: ignore[arg-type]
            time.sleep(self.seconds)
        self.work = None
        latest = time.monotonic() + LONGEST_S
        while _uses(self.tensors) > self.before and time.monotonic() < latest:
            time.sleep(1e-4)
        self.tensors, self.before = [], []
        return True
