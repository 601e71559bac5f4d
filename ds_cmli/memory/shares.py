"""Finds what other ranks need from one rank's record, where ZeRO-1 and 2 partition gradients.

DeepSpeed divides each group of parameters by elements. A rank keeps the whole reduced gradient of
each parameter of which it has a part, all in one buffer, from when the first of them has been
reduced. DeepSpeed's own table says which ranks have a part of a parameter, and the record when it
is reduced: so follow the events of every other rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ds_cmli.common.patches import replaced
from ds_cmli.memory.tracker import MemoryTracker
from ds_cmli.memory_model.blocks import Event

if TYPE_CHECKING:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

SHARE = "ZeRO share"  # the operator of blocks that differ by rank; then a method, and a group
ALL = -1  # in place of a group: one block for all groups
NEAR = 20  # changes in the record between a reduction and the block that is allocated for it


class Method(NamedTuple):
    """A method of the optimizer that allocates blocks which differ by rank."""

    sized: bool  # whether the bytes follow the elements of the rank's parameters
    timed: bool  # whether the block comes with the rank's first reduced gradient
    group: int | None  # the argument that is the group


METHODS = {
    "copy_grads_in_partition": Method(True, True, None),
    "_build_compact_grad_partition_buffer": Method(False, True, 0),
}


@dataclass
class Shares:
    """The parts of all ranks in the parameters, and when they show in the record of one.

    Args:
        rank: the recorded one.
        elements: by rank and group, those of all parameters of which the rank has a part; empty if
            nothing differs by rank.
        first: for each recorded backward pass, by (group or `ALL`, rank), the place in the record
            at which the first such parameter is reduced, for `ALL` at which it has been.
    """

    rank: int
    elements: list[dict[int, int]] = field(default_factory=list)
    first: list[dict[tuple[int, int], int]] = field(default_factory=list)

    def kinds(self) -> list[int]:
        """A rank of each kind: those of one kind need the same memory."""
        kinds: dict[object, int] = {}
        for rank, elements in enumerate(self.elements):
            places = [of.get((group, rank)) for of in self.first for group in elements]
            kinds.setdefault((*elements.values(), *places), rank)
        return list(kinds.values())

    def events(self, recorded: list[Event], rank: int) -> list[Event]:
        """The events as this rank would have recorded them."""
        out: list[tuple[float, Event]] = []
        place = 0  # in the record, which knows of no cuBLAS
        for event in recorded:
            if event.op.startswith(SHARE):
                out += self._of_rank(event, place, rank)
            else:
                out.append((place, event))
            place += event.block >= 0
        out.sort(key=itemgetter(0))
        return list(map(itemgetter(1), out))

    def _of_rank(self, event: Event, place: int, rank: int) -> Iterator[tuple[float, Event]]:
        """The event of another rank, if it has it, and its place: half before one of the record."""
        name, number = event.op.removeprefix(SHARE).split()
        method, group = METHODS[name], int(number)
        size = event.bytes
        if method.sized:
            size = size * self.elements[rank][group] // self.elements[self.rank][group]
        at: float = place
        if method.timed and size > 0:
            for of in self.first:
                before, after = of.get((group, self.rank)), of.get((group, rank))
                if before not in (None, after) and after is not None and 0 <= place - before < NEAR:
                    at = after - 0.5
        if size:
            yield at, replace(event, bytes=size)


def requested_peak(events: list[Event]) -> int:
    return max(accumulate(map(attrgetter("bytes"), events)), default=0)


@contextmanager
def followed(
    tracker: MemoryTracker, optimizer: DeepSpeedZeroOptimizer, rank: int
) -> Iterator[Shares]:
    """Inside, record what differs by rank in the steps of DeepSpeed's optimizer.

    Nothing does at other stages than 1 and 2, nor on the device if it is offloaded.
    """
    shares = Shares(rank)
    with ExitStack() as stack:
        if hasattr(optimizer, "param_to_partition_ids") and not optimizer.cpu_offload:
            reduce = _noting_reductions(tracker, optimizer, shares)
            stack.enter_context(replaced(optimizer, "average_tensor", reduce))
            for name in METHODS:
                marked = _marked(tracker, getattr(optimizer, name), name)
                stack.enter_context(replaced(optimizer, name, marked))
        yield shares


def _noting_reductions(
    tracker: MemoryTracker, optimizer: DeepSpeedZeroOptimizer, shares: Shares
) -> Callable[[Tensor, torch.dtype], None]:
    groups = optimizer.param_to_partition_ids  # by group and parameter, its ranks
    average = optimizer.average_tensor
    shares.elements = [dict.fromkeys([ALL, *groups], 0) for _ in range(dist.get_world_size())]
    for group, ranks_of in groups.items():
        for parameter, ranks in ranks_of.items():
            for rank in ranks:
                for key in (ALL, group):
                    shares.elements[rank][key] += optimizer.param_dict[parameter].numel()
    reduced: set[int] = set()  # in the current backward pass

    def run(tensor: Tensor, dtype: torch.dtype) -> None:
        bucket = list(optimizer.ipg_buckets[dtype].params)
        parameters = set(map(itemgetter(2), bucket))
        if not shares.first or reduced & parameters:
            shares.first.append({})
            reduced.clear()
        reduced.update(parameters)
        start = len(tracker.log)
        average(tensor, dtype)
        for group, _, parameter in bucket:
            for rank in groups[group][parameter]:
                shares.first[-1].setdefault((group, rank), start)
                shares.first[-1].setdefault((ALL, rank), len(tracker.log))

    return run


def _marked(
    tracker: MemoryTracker, method: Callable[..., object], name: str
) -> Callable[..., object]:
    at = METHODS[name].group

    def run(*args: object, **kwargs: object) -> object:
        first = len(tracker.blocks)
        result = method(*args, **kwargs)
        group = ALL if at is None else args[at]
        for block in tracker.blocks[first:]:
            if block.ended is None and not block.op.startswith(SHARE):
                block.op = f"{SHARE} {name} {group}"
        return result

    return run
