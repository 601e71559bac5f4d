"""The process group of the training: its start and end, and small messages between ranks."""

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ds_cmli.common.errors import UserError, first_line, one_line
from ds_cmli.distributed import rendezvous
from ds_cmli.distributed.launchers import map_launcher_environment, this_node

Value = TypeVar("Value")
LIMIT = 180.0  # seconds in which ranks that have met are connected
REMEDIES = {
    "nccl": "set it to the network device by which the nodes reach each other, or "
    "NCCL_P2P_DISABLE=1 if the GPUs of one node do not; NCCL_DEBUG=INFO tells more",
    "gloo": "set it to the network device by which the nodes reach each other",
}


def init() -> torch.device:
    """Start the process group and return this rank's device. Collective.

    Raises `UserError` as `meet` and `connect` do.
    """
    return connect(meet())  # collectives


def meet(start: timedelta = timedelta(minutes=10)) -> dist.Store:
    """Wait for all ranks, and return the store that they share. Collective.

    Args:
        start: how long the ranks wait for each other.

    Raises:
        UserError: not all ranks have started in time, or this rank alone on its node has no GPU.
    """
    map_launcher_environment()
    _device()
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()  # type: ignore[attr-defined]
    return rendezvous.meet(start)  # collective


def connect(
    store: dist.Store, timeout: timedelta = timedelta(minutes=30), limit: float = LIMIT
) -> torch.device:
    """Start the process group of ranks that have met, and return this rank's device. Collective.

    The group is of NCCL on GPUs, and of gloo on CPUs. One that is up already is taken as it is.

    Args:
        timeout: the time limit of a collective.
        limit: that of the first one, in seconds; ranks that do not reach each other end by it.

    Raises:
        UserError: the ranks do not reach each other.
    """
    device = _device()
    if dist.is_initialized():
        return device
    backend = "nccl" if device.type == "cuda" else "gloo"
    store.set_timeout(timeout)
    with connecting(backend, limit):
        rendezvous.choose_device_of_gloo(store)  # collective
        dist.init_process_group(  # collective
            backend,
            store=store,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timeout,
            # NCCL connects at once, and every group of all ranks shares its connections.
            device_id=device if device.type == "cuda" else None,
        )
        first = torch.ones(1, device=device)
        dist.all_reduce(first)  # collective
        first.item()  # CPU-GPU sync
    return device


@contextmanager
def connecting(backend: str, limit: float) -> Iterator[None]:
    """Inside, ranks connect: they make groups of `backend`, and each group's first collective.

    A rank that waits longer than `limit` seconds ends with exit code 2, as nothing else ends a
    collective of NCCL; rank 0 prints the line.

    Raises:
        UserError: the backend has found out itself that it does not reach a rank.
    """
    timer = threading.Timer(limit, partial(_end, backend, limit))
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"{_line(backend, 'failed')} ({first_line(error)})") from error
    finally:
        timer.cancel()


def _end(backend: str, limit: float) -> None:
    if os.environ["RANK"] == "0":
        line = _line(backend, f"did not end within {limit:g} s")
        print(f"error: {line}", file=sys.stderr, flush=True)
        time.sleep(2)  # it holds the store, and ends last
    time.sleep(2)  # a launcher that sees one rank end kills the others, rank 0 among them
    os._exit(2)


def _line(backend: str, what: str) -> str:
    env = os.environ
    name = f"{backend.upper()}_SOCKET_IFNAME"
    value = repr(env[name]) if name in env else "not set"
    return (
        f"the {env['WORLD_SIZE']} ranks met at {env['MASTER_ADDR']}:{env['MASTER_PORT']}, but "
        f"their first collective over {backend} {what}; {name} is {value}: {REMEDIES[backend]}"
    )


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count, local = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if local >= count:
        rank = os.environ["RANK"]
        message = f"rank {rank} has no GPU: its node has {count}; start one rank a GPU"
        if rank != "0":  # the mistakes of rank 0 are printed anyway
            print(f"error: {message}", file=sys.stderr, flush=True)
        raise UserError(message)
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def is_up() -> bool:
    return dist.is_initialized()


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


def raise_together(mistake: str | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise `UserError` on all ranks if any gives a message, with the first one's. Collective."""
    gathered = gather_objects((this_node(), mistake), group)  # collective
    nodes, mistakes = zip(*gathered, strict=True)
    for rank, first in enumerate(mistakes):
        if first:
            same = len({*mistakes}) == 1
            raise UserError(first if same else f"{named(rank, nodes)}: {first}")


class CollectiveFlags:
    """Decisions that ranks take together, such as whether any was signalled or has to save.

    They are small messages between the ranks' CPUs, over a gloo group. Over NCCL each of them would
    be a CPU-GPU sync.
    """

    def __init__(self, limit: float = LIMIT) -> None:
        """Collective; `limit` is as in `connect`."""
        self.group: dist.ProcessGroup | None = None
        if world_size() > 1 and dist.get_backend() != "gloo":
            with connecting("gloo", limit):
                self.group = dist.new_group(backend="gloo")  # collective
                self.any(False)  # collective

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
        try:  # collective, on the CPU
            raise_together(None if error is None else one_line(error), self.group)
        except UserError:
            if error is None or isinstance(error, UserError):
                raise
            raise error from None
