"""What collectives hold beside their tensors, and how a measurement on a CPU sees all of it.

gloo copies what it gathers and what it scatters; NCCL does not, whose own buffers lie outside torch's allocator.
Of collectives in flight together, as ZeRO-3's gathers after a step, gloo may hold several copies at once, which only
the moment decides: predicted is one.
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

# Of each collective the argument that gloo makes a flat copy of; all_reduce and broadcast work in place.
GLOO_COPIES = {
    torch.ops.c10d._allgather_base_.default: 0,
    torch.ops.c10d.allgather_.default: 0,
    torch.ops.c10d._reduce_scatter_base_.default: 1,
}
LONGEST_S = 1.0  # seconds to wait until gloo's thread has released a collective's tensors, which takes microseconds
COPY_S = 0.005  # seconds until gloo has released its internal copies, which nothing counts


def copied_bytes(func: Any, args: tuple, backend: str) -> int:
    """What `backend` copies for itself while the operator `func` runs, a collective."""
    copied = GLOO_COPIES.get(func) if backend == "gloo" else None
    return 0 if copied is None else sum(t.nbytes for t in tree_leaves(args[copied]) if isinstance(t, Tensor))


@contextmanager
def seen_by_the_profiler() -> Iterator[None]:
    """Inside, collectives return only after gloo's thread has released their tensors.

    It does so a moment after the caller goes on. A tensor that the caller has let go of by then ends in that thread,
    where the profiler does not look, and would be taken for one that lives on.
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
    """A `dist.Work` whose `wait` returns when only the caller still holds its tensors."""

    def __init__(self, work: dist.Work | None, tensors: list[Tensor], before: list[int], seconds: float):
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
