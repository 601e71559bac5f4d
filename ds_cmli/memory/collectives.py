"""The memory that collectives take besides their tensors, and how a measurement on a CPU sees all of it.

gloo makes copies in all-gathers and reduce-scatters. NCCL makes none, and its own buffers lie outside torch's
allocator. While several collectives are in flight together, such as ZeRO-3's all-gathers after a step, gloo may hold
several copies at once. How many depends on timing; the prediction counts one.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ds_cmli.common.patches import patched

# The index of the argument that gloo makes a flat copy of, for each collective; all_reduce and broadcast work in place.
GLOO_COPIES = {
    torch.ops.c10d._allgather_base_.default: 0,
    torch.ops.c10d.allgather_.default: 0,
    torch.ops.c10d._reduce_scatter_base_.default: 1,
}
LONGEST_S = 1.0  # seconds to wait at most until gloo's thread has released a collective's tensors; microseconds suffice
COPY_S = 0.005  # seconds to wait for gloo to release its internal copies, which have no count that could be asked


def copied_bytes(func: Any, args: tuple, backend: str) -> int:
    """Bytes of the copies that `backend` makes for itself while the collective operator `func` runs."""
    copied = GLOO_COPIES.get(func) if backend == "gloo" else None
    return (
        0
        if copied is None
        else sum(t.nbytes for t in tree_leaves(args[copied]) if isinstance(t, Tensor))
    )


@contextmanager
def seen_by_the_profiler() -> Iterator[None]:
    """Inside, collectives return only after gloo's thread has released their tensors.

    gloo's thread does so a moment after the caller has gone on. A tensor that the caller has dropped by then is freed
    in that thread, which the profiler does not record, so it would be counted as if it were never freed.
    """
    with (
        patched("torch: collectives", lambda method: _to_the_end(method, 0.0)),
        patched("torch: scattering collectives", lambda method: _to_the_end(method, COPY_S)),
    ):
        yield


def _to_the_end(method: Callable, seconds: float) -> Callable:
    def run(group: dist.ProcessGroup, *arguments: Any) -> "_Work | None":
        tensors = [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]
        before = [t._use_count() for t in tensors]  # type: ignore[attr-defined]
        work = _Work(method(group, *arguments), tensors, before, seconds)
        if arguments[-1].asyncOp:
            return work
        work.wait()
        return None

    return run


class _Work:
    """A `dist.Work` whose `wait` returns when only the caller holds its tensors, or `LONGEST_S` after its end."""

    def __init__(
        self, work: dist.Work | None, tensors: list[Tensor], before: list[int], seconds: float
    ):
        self.work, self.tensors, self.before, self.seconds = work, tensors, before, seconds

    def is_completed(self) -> bool:
        return self.work is None or self.work.is_completed()

    def wait(self, *timeout: Any) -> bool:
        if self.work is not None:
            self.work.wait(*timeout)
            time.sleep(self.seconds)
        self.work = None
        latest = time.monotonic() + LONGEST_S
        while [t._use_count() for t in self.tensors] > self.before and time.monotonic() < latest:  # type: ignore[attr-defined]
            time.sleep(1e-4)
        self.tensors, self.before = [], []
        return True
