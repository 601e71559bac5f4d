"""The process group of the training: starting and ending it, this process's rank, and small messages between ranks."""

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ds_cmli.common.errors import UserError
from ds_cmli.distributed import rendezvous
from ds_cmli.distributed.launchers import map_launcher_environment, this_node


def init(
    timeout: timedelta = timedelta(minutes=30),
    start: timedelta = timedelta(minutes=10),
    stop: Callable[[], None] = lambda: None,
) -> torch.device:
    """Start the process group (NCCL on GPUs, gloo on CPUs) and return this rank's device. Collective.

    Args:
        timeout: the time limit of a collective.
        start: how long the ranks wait for each other here.
        stop: called repeatedly while they wait; an exception that it raises ends the waiting.

    Raises:
        UserError: not all ranks have started in time, or this rank has no GPU although its node has some.
    """
    map_launcher_environment()
    if torch.cuda.is_available():
        here = torch.cuda.device_count()
        if int(os.environ["LOCAL_RANK"]) >= here:
            message = (
                f"rank {os.environ['RANK']} has no GPU: its node has {here}; start one rank a GPU"
            )
            if os.environ["RANK"] != "0":  # the mistakes of rank 0 are printed anyway
                print(f"error: {message}", file=sys.stderr, flush=True)
            raise UserError(message)
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if not dist.is_initialized():
        store = rendezvous.meet(start, stop)  # collective
        store.set_timeout(timeout)
        name = "nccl" if device.type == "cuda" else "gloo"
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(
            name, store=store, rank=rank, world_size=ranks, timeout=timeout
        )  # collective
    return device


def shutdown() -> None:
    """End the process group. A process that exits without this may abort."""
    if dist.is_initialized():
        # DeepSpeed caches groups, and would give the ended ones to this process's next engine if it did not end them.
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


def mean_over_ranks(values: Tensor) -> Tensor:
    """The average of `values` over ranks, in place. Collective."""
    if world_size() > 1:
        dist.all_reduce(values)  # collective
        values /= world_size()
    return values


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of `values` over ranks, in place; they may be on the CPU or on this rank's device. Collective."""
    if world_size() > 1:
        moved = (
            values.cuda() if dist.get_backend() == "nccl" else values
        )  # NCCL does not accept CPU tensors
        dist.all_reduce(moved)  # collective
        values.copy_(moved)  # CPU-GPU sync, under NCCL
    return values


def raise_together(mistake: str | None) -> None:
    """Raise `UserError` on all ranks if any rank gives a message, with the lowest such rank's. Collective."""
    nodes, told = zip(*gather_objects((this_node(), mistake)), strict=True)  # collective
    first = next((r for r, message in enumerate(told) if message), None)
    if first is not None:
        raise UserError(told[first] if all(told) else f"{named(first, nodes)}: {told[first]}")


def named(rank: int, nodes: Sequence[str]) -> str:
    """What a message calls a rank: with its node where the ranks are on several; `nodes`: that of each rank."""
    return f"rank {rank} on node {nodes[rank]}" if len(set(nodes)) > 1 else f"rank {rank}"


def broadcast_object(value, source: int = 0):
    """The `value` of rank `source` on every rank. Collective."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)  # collective
    return box[0]


def gather_objects(value) -> list:
    """Every rank's `value`, in rank order, on every rank. Collective."""
    if world_size() == 1:
        return [value]
    out: list = [None] * world_size()
    dist.all_gather_object(out, value)  # collective
    return out
