"""The process group of the training: its start and end, and small messages between ranks."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ds_cmli.distributed import map_launcher_environment, this_node
from ds_cmli.errors import UserError, blame, one_line

Value = TypeVar("Value")
TIMEOUT = timedelta(minutes=30)  # of a collective, and in which all ranks start


def init() -> torch.device:
    """Start the process group, NCCL on GPUs and gloo on CPUs, and return this rank's device.

    A process group that exists is kept. Raises `UserError` if not all ranks have started in time,
    or do not reach each other. Collective.
    """
    map_launcher_environment()
    rank = int(os.environ["RANK"])
    num_ranks = int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    with blame(f"rank {rank} of {num_ranks} cannot start"):
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        if dist.is_initialized():
            return device
        store: dist.Store = dist.HashStore()  # which needs no port
        if num_ranks > 1:
            address = os.environ["MASTER_ADDR"]
            store = launch_store(rank, num_ranks, address, os.environ["MASTER_PORT"])
            num_groups_before = (store.add("ds_cmli", 1) - 1) // num_ranks
            store = dist.PrefixStore(f"ds_cmli/{num_groups_before}", store)
        # With this, gloo connects two ranks only when one sends to the other, and not all pairs.
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
        dist.init_process_group(  # collective
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=num_ranks,
            timeout=TIMEOUT,
            # NCCL connects now; a later group connects when it is made.
            device_id=device if device.type == "cuda" else None,
        )
        CollectiveFlags().any(False)  # collective: a rank that cannot be reached is an error here
    return device


@cache
def launch_store(rank: int, num_ranks: int, address: str, port: str) -> dist.Store:
    """Return the store of this launch. It is cached because its port stays taken."""
    return next(dist.rendezvous("env://", timeout=TIMEOUT))[0]


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


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def num_collectives() -> int:
    """Return how many collectives this rank has entered so far, in all of its process groups."""
    groups: list[Any] = [*dist.distributed_c10d._world.pg_map]
    return CollectiveFlags.num_rounds + sum(x._get_sequence_number_for_group() for x in groups)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum `values`, on the CPU or on this rank's device, over ranks, in place. Collective."""
    if world_size() > 1:
        # NCCL does not accept CPU tensors.
        moved = values.cuda() if dist.get_backend() == "nccl" else values
        dist.all_reduce(moved)  # collective
        if moved is not values:
            values.copy_(moved)  # CPU-GPU sync
    return values


def broadcast_object(value: Value | None) -> Value:
    """Return the `value` of rank 0, whatever the others give. Collective."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0)  # collective
    return values[0]  # type: ignore[return-value]


def gather_objects(value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """Return every rank's `value`, in rank order, on every rank. Collective."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value, group=group)  # collective
    return values


def gather_tensors(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Return every rank's tensors, all on the CPU, in rank order, on every rank. Collective.

    They may differ between ranks in number, shape and dtype. They travel as bytes, because
    `gather_objects` takes up to twice as long for large tensors.
    """
    if world_size() == 1:
        return [tensors]
    parts = [x.contiguous().flatten().view(torch.uint8) for x in tensors]
    local_layout = [(len(part), x.dtype, x.shape) for part, x in zip(parts, tensors, strict=True)]
    layouts = gather_objects(local_layout)  # collective
    num_bytes = [sum(size for size, _, _ in layout) for layout in layouts]
    padding = torch.zeros(max(num_bytes) - num_bytes[rank()], dtype=torch.uint8)
    sent = torch.cat([*parts, padding])
    if dist.get_backend() == "nccl":
        sent = sent.cuda()
    received = [torch.empty_like(sent) for _ in layouts]
    dist.all_gather(received, sent)  # collective
    gathered: list[list[Tensor]] = [[] for _ in layouts]
    for bytes_of_rank, layout, result in zip(received, layouts, gathered, strict=True):
        sizes = [size for size, _, _ in layout]
        received_parts = bytes_of_rank[: sum(sizes)].cpu().split(sizes)  # CPU-GPU sync
        for part, (_, dtype, shape) in zip(received_parts, layout, strict=True):
            # A copy begins at a multiple of the elements' size, as `view` needs it.
            result.append(part.clone().view(dtype).view(shape))
    return gathered


@contextmanager
def raised_together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Raise on all ranks the error of the first rank that raises inside, as a `UserError`.

    Another exception than a `UserError` is raised unchanged on its own rank. Collective.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    local_message = str(error) if isinstance(error, UserError) else error and one_line(error)
    gathered = gather_objects((this_node(), local_message), group)  # collective
    nodes, messages = zip(*gathered, strict=True)
    if error is not None and not isinstance(error, UserError):
        raise error
    if len({*messages}) == 1 and messages[0]:
        raise UserError(messages[0])
    for number, message in enumerate(messages):
        if message:
            node = f" on node {nodes[number]}" if len({*nodes}) > 1 else ""
            raise UserError(f"rank {number}{node}: {message}")


class CollectiveFlags:
    """Decisions that ranks take together, such as whether any was signalled or has to save.

    They are small messages between the ranks' CPUs, over a gloo group: over NCCL each of them would
    be a CPU-GPU sync.
    """

    num_rounds = 0  # of messages between ranks so far, in this process

    def __init__(self) -> None:
        """Collective."""
        self.group: dist.ProcessGroup | None = None
        if world_size() > 1 and dist.get_backend() != "gloo":
            self.group = dist.new_group(backend="gloo")  # collective

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set on any rank. Collective."""
        return [value > 0 for value in self.max(*map(int, flags))]

    def max(self, *values: int) -> list[int]:
        """Return the maximum over ranks of each value. Collective.

        It takes ceil(log2 P) messages in turn; gloo's all-reduce, a ring, 2 (P - 1). In round k a
        rank sends its result to the rank 2^k after it, which then covers twice as many ranks.
        """
        result = torch.tensor(values)
        received = torch.empty_like(result)
        distance = 1
        while distance < world_size():
            receiver = (rank() + distance) % world_size()
            sender = (rank() - distance) % world_size()
            CollectiveFlags.num_rounds += 1
            sending = dist.isend(result, receiver, self.group)
            dist.recv(received, sender, self.group)  # collective, on the CPU
            sending.wait()  # type: ignore[union-attr]  # `result` is replaced only now
            result = result.maximum(received)
            distance *= 2
        return result.tolist()


class SpacedFlag:
    """A flag in a loop of short rounds, for which ranks ask each other once in `seconds`."""

    def __init__(self, flags: CollectiveFlags, seconds: float = 5.0):
        self.flags = flags
        self.seconds = seconds
        self.rounds_between = 1  # from one exchange to the next
        self.rounds_left = 1
        self.exchanged_at = time.monotonic()

    def any(self, flag: bool) -> bool:
        """Return True if the flag is set on any rank; between two exchanges, return False.

        All ranks call it equally often. Collective in the rounds with an exchange.
        """
        self.rounds_left -= 1
        if self.rounds_left > 0:
            return False
        milliseconds = 1000 * (time.monotonic() - self.exchanged_at) / self.rounds_between
        is_set, slowest = self.flags.max(flag, round(milliseconds))  # collective
        # At most twice as many as before, because the first rounds may be the fastest.
        num_rounds = round(1000 * self.seconds / max(1, slowest))
        self.rounds_between = max(1, min(2 * self.rounds_between, num_rounds))
        self.rounds_left = self.rounds_between
        self.exchanged_at = time.monotonic()
        return bool(is_set)
