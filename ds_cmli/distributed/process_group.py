"""The process group: its start and its end, this process's place in it, and small messages between its ranks."""

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ds_cmli.common.errors import UserError
from ds_cmli.distributed import rendezvous
from ds_cmli.distributed.launchers import map_launcher_environment

# Entered around what moves text between ranks: a training that measures its steps puts its clock here.
exchanging: Callable[[], AbstractContextManager] = nullcontext


def init(
    timeout: timedelta = timedelta(minutes=30),
    start: timedelta = timedelta(minutes=10),
    stop: Callable[[], None] = lambda: None,
) -> torch.device:
    """Start the process group (NCCL on GPUs, gloo on CPUs) and return this rank's device. Collective.

    Args:
        timeout: of a collective.
        start: how long the ranks wait for each other here.
        stop: called while they wait; what it raises ends that.

    Raises:
        UserError: not all ranks have come in time.
    """
    map_launcher_environment()
    if torch.cuda.is_available():
        here = torch.cuda.device_count()
        if int(os.environ["LOCAL_RANK"]) >= here:
            message = f"rank {os.environ['RANK']} has no GPU: its node has {here}; start one rank a GPU"
            if os.environ["RANK"] != "0":  # only rank 0's mistakes are told by themselves
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
        dist.init_process_group(name, store=store, rank=rank, world_size=ranks, timeout=timeout)  # collective
    return device


def shutdown() -> None:
    """End the process group; without it a process may abort at exit."""
    global exchanging
    exchanging = nullcontext
    if dist.is_initialized():
        # DeepSpeed caches groups and would hand the ended ones to the next engine of this process: let it end them.
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
    """Average of `values` over ranks, in place. Collective."""
    if world_size() > 1:
        dist.all_reduce(values)  # collective
        values /= world_size()
    return values


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of `values`, on the CPU or on this rank's device, over ranks, in place. Collective."""
    if world_size() > 1:
        moved = values.cuda() if dist.get_backend() == "nccl" else values  # NCCL takes no CPU tensors
        dist.all_reduce(moved)  # collective
        values.copy_(moved)  # CPU-GPU sync, under NCCL
    return values


def raise_together(mistake: str | None) -> None:
    """Raise the first rank's `UserError` on all ranks, where any has one. Collective."""
    told = gather_objects(mistake)  # collective
    first = next((r for r, message in enumerate(told) if message), None)
    if first is not None:
        raise UserError(told[first] if all(told) else f"rank {first}: {told[first]}")


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
