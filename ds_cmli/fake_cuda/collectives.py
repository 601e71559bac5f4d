"""Collectives of a rank whose fellows are not there: they return at once.

Results keep their shapes. What is gathered from the other ranks is this rank's.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.utils._pytree import tree_leaves

# mypy: disable-error-code="override,assignment"
# PyTorch's stubs overload each collective, and call it with any of them.
from ds_cmli.fake_cuda.stand_ins import copy_values
from ds_cmli.fake_cuda.steps import StepRecorder


class Done(dist.Work):
    """A collective that is over, but holds its tensors, as NCCL's does, until somebody waits for
    it (not for its future, as DDP does) or another one begins later."""

    def __init__(self, result: object, held: object, unwaited: dict["Done", int]):
        super().__init__()
        self.held, self.unwaited = held, unwaited
        self.future: Future = Future()
        self.future.set_result(result)

    def wait(self, timeout: object = None) -> bool:
        self.unwaited.pop(self, None)
        self.held = None
        return True

    def is_completed(self) -> bool:
        return True

    def get_future(self) -> Future:
        return self.future


class Rank(dist.ProcessGroup):
    """A process group of which only this rank is there."""

    recorder: StepRecorder
    # Collectives that nobody has waited for yet, by the number of steps done before them.
    unwaited: dict[Done, int]

    @classmethod
    def made(cls, options, _: object) -> "Rank":
        return cls(options.group_rank, options.group_size)  # type: ignore[call-arg]

    def getBackendName(self) -> str:
        return "nccl"

    def _set_group_name(self, name: str) -> None:
        self.given_name = name

    @property
    def group_name(self) -> str:
        return self.given_name

    def _over(self, result: object, others: object = None, held: object = None) -> Done:
        self.recorder.see_exchanged(tree_leaves((result, others)))
        step = self.recorder.progress.done.total()
        if self.recorder.phase == "backward":
            # NCCL's thread has found those of earlier steps done.
            for work, begun in list(self.unwaited.items()):
                if begun < step:
                    del self.unwaited[work]
        work = Done(result, (others, held), self.unwaited)
        self.unwaited[work] = step
        return work

    def allreduce(self, tensors: list[Tensor], opts: object = None) -> Done:
        return self._over(tensors)

    broadcast = reduce = allreduce_coalesced = allreduce

    def send(self, tensors: list[Tensor], *_: object) -> Done:
        return self._over(tensors)

    recv = recv_anysource = send

    def barrier(self, opts: object = None) -> Done:
        return self._over(None, held=torch.empty(1, device="cuda"))

    def monitored_barrier(self, *_: object, **__: object) -> None:
        pass

    def allgather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: object = None
    ) -> Done:
        """Gather tensors of equal sizes through a flat copy, as NCCL does."""
        held = list(map(_flat, outputs))
        for parts, own in zip(outputs, inputs, strict=True):
            for part in parts:
                copy_values(part, own)
        return self._over(outputs, inputs, held)

    def allgather_coalesced(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: object = None
    ) -> Done:
        for parts in outputs:
            for part, own in zip(parts, inputs, strict=True):
                copy_values(part, own)
        return self._over(outputs, inputs)

    def all_gather_single(self, output: Tensor, own: Tensor, *_: object) -> Done:
        copy_values(output, own)
        return self._over(output, own)

    all_to_all_single = gather_single = gather_into_tensor = all_gather_single
    _allgather_base = alltoall_base = all_gather_single  # as PyTorch before 2.13 calls them

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: object = None
    ) -> Done:
        for output, own in zip(outputs, inputs, strict=True):
            copy_values(output, own)
        return self._over(outputs, inputs)

    alltoall = allgather_into_tensor_coalesced = all_gather_single_coalesced

    def reduce_scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: object = None
    ) -> Done:
        return self._over(outputs, inputs, list(map(_flat, inputs)))

    def reduce_scatter_single(self, output: object, given: object, opts: object = None) -> Done:
        return self._over(output, given)

    _reduce_scatter_base = reduce_scatter_single_coalesced = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single

    def gather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: object = None
    ) -> Done:
        for part in tree_leaves(outputs):
            copy_values(part, inputs[0])
        return self._over(outputs, inputs)

    def scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: object = None
    ) -> Done:
        if inputs:
            copy_values(outputs[0], inputs[0][self.rank()])
        return self._over(outputs, inputs)


def _flat(parts: Sequence[Tensor]) -> Tensor | None:
    """The buffer that NCCL takes for a list of tensors of equal sizes."""
    first = parts[0]
    if any(part.numel() != first.numel() for part in parts):
        return None
    return first.new_empty(len(parts) * first.numel())
