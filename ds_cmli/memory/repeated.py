"""Skips the micro-batches of a prediction that would only repeat those before them.

All micro-batches of a predicted step have the same size. The first few and the last one run on
tensors without data. As soon as two consecutive ones have left the same events in the tracker's
log, those between them and the last one are not run: the events are copied, with new blocks. So the
time of a prediction hardly depends on the number of micro-batches, and its bytes are those of the
whole step. To compare the events of two calls, each block is named by its origin: the third block
of this call, the first one that the call before it left, a tensor of its arguments.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from ds_cmli.common.probe import Probe, Returned
from ds_cmli.common.trees import tensors, tree_map
from ds_cmli.data.batch import Batch
from ds_cmli.distributed.traffic import Counts, Traffic
from ds_cmli.fake_cuda.recorder import Change
from ds_cmli.memory.tracker import MemoryTracker


class Repeated(Probe):
    """Runs only those of a step's micro-batches that differ.

    Args:
        tracker: attached to the engine; the micro-batches of the step must have equal shapes.
        accumulation: the number of micro-batches of the step.
        traffic: counts the step's traffic, including that of what is not run.
    """

    def __init__(self, tracker: MemoryTracker, accumulation: int, traffic: Traffic):
        self.tracker, self.accumulation, self.traffic = tracker, accumulation, traffic
        self.functions: dict[str, _Repeated] = {}

    def alike(self, function: Callable[..., Returned], *arguments: object) -> Returned:
        name = function.__qualname__
        if name not in self.functions:
            self.functions[name] = _Repeated(function, self)
        return self.functions[name](*arguments)


class Origin(Enum):
    """Origin of a block that an event of a call is about."""

    THIS_CALL = "allocated by this call"
    LAST_CALL = "allocated by the call before it, or between the two"
    ARGUMENT = "of a tensor that was passed to the call"
    OUTSIDE = "any other"


class BlockRef(NamedTuple):
    origin: Origin
    number: int  # among the blocks of that origin


class _Event(NamedTuple):
    block: BlockRef
    bytes: int  # negative: a free
    phase: str
    segment: int  # counted from the call's first


@dataclass
class _Form:
    """Describes a tensor of a result without keeping it alive."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    storage: int  # bytes
    value: Tensor | None  # a copy of a random generator's state: no other tensor holds data

    @classmethod
    def of(cls, tensor: Tensor) -> "_Form":
        value = None
        if not isinstance(tensor, FakeTensor):
            with unset_fake_temporarily():
                value = tensor.clone()
        offset, storage = int(tensor.storage_offset()), int(tensor.untyped_storage().nbytes())
        return cls(tensor.shape, tensor.stride(), offset, tensor.dtype, storage, value)

    def empty(self) -> Tensor:
        """A new flat tensor with such a storage, or a new copy of `value`."""
        if self.value is None:
            return torch.empty(self.storage // self.dtype.itemsize, dtype=self.dtype)
        with unset_fake_temporarily():
            return self.value.clone()

    def view(self, base: Tensor) -> Tensor:
        """This tensor's shape in the storage of `base`; `base` itself as a copy of `value`."""
        if self.value is not None:
            return base
        return base.detach().as_strided(self.shape, self.stride, self.offset)


@dataclass
class _Done:
    """What a call did to the tracker, in terms that are the same for calls that do the same."""

    events: list[_Event]
    segments: int  # number of segments that the call began
    outputs: list[BlockRef]  # of each tensor of the result
    moved: Counts  # the call's traffic, by part and kind

    def handed_on(self) -> set[int]:
        """The blocks that the next call frees, as this call freed those of the call before it."""
        handed_on = set()
        for event in self.events:
            if event.block.origin is Origin.LAST_CALL and event.bytes < 0:
                handed_on.add(event.block.number)
        return handed_on


@dataclass
class _Run:
    """A call that was run. Its blocks are numbered from `first`, its segments from `segment`."""

    first: int
    blocks: int  # their number, with those that have become another one's place
    segment: int
    end: int  # length of the log after the call
    done: _Done
    result: object  # with a `_Form` in the place of each tensor


class _Repeated:
    """A function that each micro-batch of a step calls once; it runs only some of the calls."""

    def __init__(self, function: Callable[..., Any], step: Repeated):
        self.function, self.count = function, step.accumulation
        self.tracker, self.traffic = step.tracker, step.traffic
        self.calls, self.steady = 0, False
        self.runs: list[_Run] = []  # the last two calls that were run
        self.first = 0  # the first block of the last call, run or copied

    def __call__(self, *args: object) -> Any:
        self.calls += 1
        if self.calls < self.count:
            self.steady = self.steady or self._has_become_steady()
            if self.steady:
                return self._copy(args)
        self._hand_on()
        return self._run(args)

    def _has_become_steady(self) -> bool:
        """Whether the next call would only repeat the last one."""
        if len(self.runs) < 2 or self.runs[-1].done != self.runs[-2].done:
            return False
        run, done = self.runs[-1], self.runs[-1].done
        outputs = {block.number for block in done.outputs if block.origin is Origin.THIS_CALL}
        if done.handed_on() & outputs:
            return False
        kept = set()
        for event in done.events:
            if event.block.origin is Origin.OUTSIDE:
                return False
            if event.block.origin is Origin.THIS_CALL and event.bytes > 0:
                kept.add(event.block.number)
        # Blocks that the call keeps and does not return must not be freed between two calls: a copy
        # holds no tensors for them.
        kept -= outputs
        later = self.tracker.log[run.end :]
        return not any(event.bytes < 0 and event.block - run.first in kept for event in later)

    def _run(self, args: tuple) -> Any:
        tracker = self.tracker
        arguments: dict[int | None, int] = {}  # block -> index of the tensor
        for index, tensor in enumerate(_own_tensors(args)):
            arguments[tracker.block_of(tensor)] = index
        first, segment, start = len(tracker.blocks), tracker.segment, len(tracker.log)
        moved = deepcopy(self.traffic.counts)
        result = self.function(*args)
        last = len(tracker.blocks)

        def ref(block: int | None) -> BlockRef:
            if block is None:
                return BlockRef(Origin.OUTSIDE, -1)
            if block in arguments:
                return BlockRef(Origin.ARGUMENT, arguments[block])
            if first <= block < last:
                return BlockRef(Origin.THIS_CALL, block - first)
            if self.runs and self.first <= block < first:
                return BlockRef(Origin.LAST_CALL, block - self.first)
            return BlockRef(Origin.OUTSIDE, block)

        events = []
        for block, size, phase in tracker.log[start:]:
            allocation = tracker.blocks[block]
            at = allocation.segment if size > 0 else allocation.ended
            assert at is not None
            events.append(_Event(ref(block), size, phase, at - segment))
        outputs = [ref(tracker.block_of(tensor)) for tensor in tensors(result)]
        with tracker.paused():
            form = tree_map(result, _Form.of)
        done = _Done(events, tracker.segment - segment, outputs, self.traffic.since(moved))
        run = _Run(first, last - first, segment, len(tracker.log), done, form)
        self.runs = [*self.runs[-1:], run]
        self.first = first
        return result

    def _copy(self, args: tuple) -> Any:
        """Log the last run's events with new blocks; returns tensors like its result."""
        tracker, run = self.tracker, self.runs[-1]
        given = _own_tensors(args)
        first, segment = len(tracker.blocks), tracker.segment
        tracker.blocks += tracker.blocks[run.first : run.first + run.blocks]
        for event in run.done.events:
            origin, index = event.block
            if event.bytes > 0:
                block, at = first + index, segment + event.segment
                model = tracker.blocks[block]
                tracker.blocks[block] = replace(model, phase=event.phase, segment=at, ended=None)
            else:
                if origin is Origin.ARGUMENT:
                    # The tensor is freed below, where its end must not be recorded again.
                    block = tracker.live.pop(given[index].untyped_storage()._cdata).block
                else:
                    block = index + {Origin.THIS_CALL: first, Origin.LAST_CALL: self.first}[origin]
                tracker.blocks[block].ended = segment + event.segment
            tracker.log.append(Change(block, event.bytes, event.phase))
        tracker.segment = segment + run.done.segments
        self.traffic.add(run.done.moved)
        result = self._result_like(run, given, first)
        self.first = first
        return result

    def _result_like(self, run: _Run, given: list[Tensor], first: int) -> Any:
        outputs = iter(run.done.outputs)
        made: dict[int, Tensor] = {}

        def like(form: _Form) -> Tensor:
            origin, index = next(outputs)
            if origin is Origin.ARGUMENT:
                return form.view(given[index])
            if origin is Origin.OUTSIDE:  # on the host, in a prediction for a GPU: not recorded
                return form.view(form.empty())
            if index not in made:
                made[index] = form.empty()
                self.tracker.follow(made[index].untyped_storage(), first + index, form.storage)
            return form.view(made[index])

        with self.tracker.paused(), torch.no_grad():
            return tree_map(run.result, like, _Form)

    def _hand_on(self) -> None:
        """Let the last run's tensors stand for the last copy's blocks, which a run will free."""
        if not self.runs or self.first == self.runs[-1].first:
            return
        run, tracker = self.runs[-1], self.tracker
        handed_on = run.done.handed_on()
        for live in list(tracker.live.values()):
            index, storage = live.block - run.first, live.storage()
            if index in handed_on and storage is not None:
                tracker.follow(storage, self.first + index, live.bytes)


def _own_tensors(args: tuple) -> list[Tensor]:
    """The tensors of a call's own micro-batch; its other arguments are the same in every call."""
    return tensors([arg for arg in args if isinstance(arg, Batch)])
