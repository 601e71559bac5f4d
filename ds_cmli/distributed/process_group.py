"""The process group of the training: its start and end, and small messages between ranks."""

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ds_cmli.common.errors import UserError
from ds_cmli.distributed import rendezvous
from ds_cmli.distributed.launchers import map_launcher_environment, this_node

Value = TypeVar("Value")


def init(
    timeout: timedelta = timedelta(minutes=30),
    start: timedelta = timedelta(minutes=10),
    stop: Callable[[], None] = lambda: None,
) -> torch.device:
    """Start the process group and return this rank's device. Collective.

    The group is of NCCL on GPUs, and of gloo on CPUs.

    Args:
        timeout: the time limit of a collective.
        start: how long the ranks wait for each other here.
        stop: called repeatedly while they wait; an exception that it raises ends the waiting.

    Raises:
        UserError: not all ranks have started in time, or this rank has no GPU although its node has
            some.
    """
    map_launcher_environment()
    device = _device()
    if not dist.is_initialized():
        store = rendezvous.meet(start, stop)  # collective
        store.set_timeout(timeout)
        dist.init_process_group(  # collective
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timeout,
        )
    return device


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    here, local = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if local >= here:
        rank = os.environ["RANK"]
        message = f"rank {rank} has no GPU: its node has {here}; start one rank a GPU"
        if rank != "0":  # the mistakes of rank 0 are printed anyway
            print(f"error: {message}", file=sys.stderr, flush=True)
        raise UserError(message)
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def shutdown() -> None:
    """End the process group. A process that exits without this may abort."""
    if not dist.is_initialized():
        return
    # DeepSpeed caches groups, and would give the ended ones to this process's next engine if it did
    # not end them.
    deepspeed_comm = sys.modules.get("deepspeed.comm")
    if deepspeed_comm is not None and deepspeed_comm.is_initialized():
        deepspeed_comm.destroy_process_group()
    else:
        dist.destroy_process_group()


def rank(group: dist.ProcessGroup | None = None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def world_size(group: dist.ProcessGroup | None = None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def named(rank: int, nodes: Sequence[str]) -> str:
    """Name a rank in a message, with its node if the ranks are on several of the `nodes`."""
    if len(set(nodes)) > 1:
        return f"rank {rank} on node {nodes[rank]}"
    return f"rank {rank}"


def mean_over_ranks(values: Tensor) -> Tensor:
    """Average `values` over ranks, in place. Collective."""
    if world_size() > 1:
        dist.all_reduce(values)  # collective
        values /= world_size()
    return values


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum `values`, on the CPU or on this rank's device, over ranks, in place. Collective."""
    if world_size() > 1:
        # NCCL does not accept CPU tensors.
        moved = values.cuda() if dist.get_backend() == "nccl" else values
        dist.all_reduce(moved)  # collective
        values.copy_(moved)  # CPU-GPU sync, under NCCL
    return values


def broadcast_object(value: Value | None, source: int = 0) -> Value:
    """The `value` of rank `source` on every rank; the others' is not looked at. Collective."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=source)  # collective
    return values[0]  # type: ignore[return-value]


def gather_objects(value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """Every rank's `value`, in rank order, on every rank. Collective."""
    if world_size() == 1:
        return [value]
    out: list[Value] = [value] * world_size()
    dist.all_gather_object(out, value, group=group)  # collective
    return out


def raise_together(mistake: str | None) -> None:
    """Raise `UserError` on all ranks if any gives a message, with the first one's. Collective."""
    nodes, mistakes = zip(*gather_objects((this_node(), mistake)), strict=True)  # collective
    for rank, first in enumerate(mistakes):
        if first:
            raise UserError(first if all(mistakes) else f"{named(rank, nodes)}: {first}")


class CollectiveFlags:
    """Decisions that ranks take together, such as whether any was signalled or has to save.

    They are small messages between the ranks' CPUs, over a gloo group. Over NCCL each of them would
    be a CPU-GPU sync.
    """

    def __init__(self) -> None:
        self.group: dist.ProcessGroup | None = None
        if world_size() > 1 and dist.get_backend() != "gloo":
            self.group = dist.new_group(backend="gloo")  # collective

    def any(self, *flags: bool) -> list[bool]:
        """Tell of each flag whether it is set on any rank. Collective."""
        if world_size() == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self.group)  # collective, on the CPU
        return raised.bool().tolist()

    def gather(self, value: Value) -> list[Value]:
        """Every rank's `value`, on every rank. Collective."""
        return gather_objects(value, self.group)  # collective, on the CPU

    def fail_together(self, error: Exception | None) -> None:
        """Raise on all ranks after some have failed. Collective.

        An unexpected error is raised on its own rank; elsewhere the first rank's message is, as a
        `UserError`.
        """
        message = None if error is None else str(error) or type(error).__name__
        nodes, messages = zip(*self.gather((this_node(), message)), strict=True)  # collective
        if error is not None and not isinstance(error, UserError):
            raise error
        rank, first = next((r, m) for r, m in enumerate(messages) if m is not None)
        raise UserError(first if world_size() == 1 else f"{named(rank, nodes)}: {first}")
