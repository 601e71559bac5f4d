"""Skips the micro-batches of a prediction that would only repeat what the micro-batches before them did.

All micro-batches of a predicted step have the same size. The first few and the last one run on tensors without data.
As soon as two consecutive ones have left the same events in the tracker's log, those between them and the last one are
not run: the events are copied, with new blocks. So the time of a prediction hardly depends on the number of
micro-batches, and its bytes are those of the whole step.

The turns of a uniform loop (`Probe.turns`) between its first and its last ones are skipped too. Each of them
frees what it allocates, so that nothing needs to be copied: the ranks of a ring that exchanges texts, and the tiles of
pairs in which losses are computed from cached features.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from ds_cmli.common.probe import Item, Probe, Result
from ds_cmli.data.batch import Batch
from ds_cmli.distributed.traffic import Counts, Traffic
from ds_cmli.engine.gradient_caching import CachedBatch
from ds_cmli.memory.tracker import Tracker

# Whose block an event is about: one of the same call, of the call before it, of a tensor that was passed to the call,
# or any other block.
HERE, BEFORE, GIVEN, ELSEWHERE = "here", "before", "given", "elsewhere"
TURNS = 5  # of a uniform loop that are run, besides the last two


class Repeated(Probe):
    """Runs only those of a step's micro-batches, and turns of its uniform loops, that differ.

    Args:
        tracker: attached to the engine; the micro-batches of the step must have equal shapes.
        accumulation: the number of micro-batches of the step.
        traffic: counts the step's traffic, including that of what is not run.
    """

    def __init__(self, tracker: Tracker, accumulation: int, traffic: Traffic):
        self.tracker, self.accumulation, self.traffic = tracker, accumulation, traffic
        self.functions: dict[str, _Repeated] = {}

    def turns(self, items: Sequence[Item]) -> Iterator[Item]:
        """Only the first and the last turns, with the traffic of all."""
        skipped = range(TURNS, len(items) - 2)
        before: Counts = {}
        for number, item in enumerate(items):
            if number == TURNS - 1:
                before = deepcopy(self.traffic.counts)
            if number == TURNS:
                self.traffic.add(self.traffic.since(before), len(skipped))
            if number not in skipped:
                yield item

    def alike(self, function: Callable[..., Result], *arguments: object) -> Result:
        name = function.__qualname__
        if name not in self.functions:
            self.functions[name] = _Repeated(
                function, self.tracker, self.accumulation, self.traffic
            )
        return self.functions[name](*arguments)


@dataclass
class _Form:
    """Describes a tensor of a result without keeping it alive."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    storage: int  # bytes
    value: Tensor | None  # a copy of the state of a random generator: no other tensor holds data

    @classmethod
    def of(cls, tensor: Tensor) -> "_Form":
        value = None
        if not isinstance(tensor, FakeTensor):
            with unset_fake_temporarily():
                value = tensor.clone()
        storage = int(tensor.untyped_storage().nbytes())
        return cls(
            tensor.shape,
            tensor.stride(),
            int(tensor.storage_offset()),
            tensor.dtype,
            storage,
            value,
        )

    def empty(self) -> Tensor:
        """A new flat tensor with such a storage, or a new copy of `value`."""
        if self.value is None:
            return torch.empty(self.storage // self.dtype.itemsize, dtype=self.dtype)
        with unset_fake_temporarily():
            return self.value.clone()

    def view(self, base: Tensor) -> Tensor:
        """This tensor's shape in the storage of `base`; `base` itself if it is a copy of `value`."""
        return (
            base
            if self.value is not None
            else base.detach().as_strided(self.shape, self.stride, self.offset)
        )


@dataclass
class _Run:
    """What a call did to the tracker. Blocks of the call are numbered from `first`, segments from `segment`."""

    first: int
    segment: int
    end: int  # length of the log after the call
    events: list[
        tuple[str, int, int, str, int]
    ]  # (whose block, its number among those, bytes, phase, segment)
    segments: int  # number of segments that the call began
    result: Any  # with a `_Form` in the place of each tensor
    outputs: list[
        tuple[str, int]
    ]  # (whose block, its number among those) of each tensor of the result
    moved: Counts  # the call's traffic, by part and kind

    def same(self, other: "_Run") -> bool:
        mine, others = ((run.events, run.segments, run.outputs, run.moved) for run in (self, other))
        return mine == others

    def handed_on(self) -> set[int]:
        """The numbers of the blocks that the next call frees, as this call freed those of the call before it."""
        return {number for whose, number, size, *_ in self.events if whose == BEFORE and size < 0}


class _Repeated:
    """A function that is called once for each of a step's `count` micro-batches; it runs only some of the calls."""

    def __init__(self, function: Callable, tracker: Tracker, count: int, traffic: Traffic):
        self.function, self.tracker, self.count, self.traffic = function, tracker, count, traffic
        self.calls, self.steady = 0, False
        self.runs: list[_Run] = []  # the last two calls that were run
        self.first = 0  # the first block of the last call, run or copied

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.calls < self.count and self._repeats():
            return self._copy(args)
        self._hand_on()
        return self._run(args)

    def _repeats(self) -> bool:
        """Whether the next call would only repeat the last one."""
        if self.steady or len(self.runs) < 2 or not self.runs[-1].same(self.runs[-2]):
            return self.steady
        run = self.runs[-1]
        outputs = {number for whose, number in run.outputs if whose == HERE}
        if any(event[0] == ELSEWHERE for event in run.events) or run.handed_on() & outputs:
            return False
        kept = {
            run.first + number
            for whose, number, size, *_ in run.events
            if whose == HERE and size > 0
        }
        kept -= {run.first + number for number in outputs}
        # Blocks that the call keeps and does not return must not be freed between two calls: a copy holds no tensors
        # for them.
        self.steady = not any(
            size < 0 and block in kept for block, size, _ in self.tracker.log[run.end :]
        )
        return self.steady

    def _run(self, args: tuple) -> Any:
        tracker = self.tracker
        given = {
            block: number
            for number, block in enumerate(map(self._block, _given(args)))
            if block is not None
        }
        first, segment, start, before = (
            len(tracker.ops),
            tracker.segment,
            len(tracker.log),
            self.first,
        )
        moved = deepcopy(self.traffic.counts)
        result = self.function(*args)
        last = len(tracker.ops)

        def whose(block: int | None) -> tuple[str, int]:
            if block in given:
                return GIVEN, given[block]
            if block is not None and first <= block < last:
                return HERE, block - first
            if block is not None and self.runs and before <= block < first:
                return BEFORE, block - before
            return ELSEWHERE, -1 if block is None else block

        events = [
            (
                *whose(block),
                size,
                phase,
                (tracker.born[block][1] if size > 0 else tracker.ended[block]) - segment,
            )
            for block, size, phase in tracker.log[start:]
        ]
        outputs = [whose(self._block(tensor)) for tensor in _tensors(result)]
        with tracker.paused():
            form = _map(result, _Form.of)
        run = _Run(
            first, segment, len(tracker.log), events, tracker.segment - segment, form, outputs,
            self.traffic.since(moved),
        )  # fmt: skip
        self.runs, self.first = [*self.runs[-1:], run], first
        return result

    def _copy(self, args: tuple) -> Any:
        """Add the last run's events to the log, with new blocks, and return tensors like those that it returned."""
        tracker, run = self.tracker, self.runs[-1]
        given = _given(args)
        blocks = [self._block(tensor) for tensor in given]
        first, segment = len(tracker.ops), tracker.segment
        for whose, number, size, phase, part in run.events:
            if size > 0:
                block, model = first + number, run.first + number
                tracker.ops.append(tracker.ops[model])
                tracker.born.append((phase, segment + part, tracker.born[model][2]))
                if model in tracker.claims:
                    tracker.claims[block] = tracker.claims[model]
            else:
                found = (
                    blocks[number]
                    if whose == GIVEN
                    else (first if whose == HERE else self.first) + number
                )
                assert found is not None
                block = found
                tracker.ended[block] = segment + part
                if (
                    whose == GIVEN
                ):  # the tensor is freed below, where its end must not be recorded again
                    tracker.blocks.pop(given[number].untyped_storage()._cdata, None)
            tracker.log.append((block, size, phase))
        tracker.segment = segment + run.segments
        self.traffic.add(run.moved)
        result = self._like(run, given, first)
        self.first = first
        for each in args:
            if isinstance(each, CachedBatch):  # pass 2 would have taken its features
                each.features = None
        return result

    def _like(self, run: _Run, given: list[Tensor], first: int) -> Any:
        outputs = iter(run.outputs)
        made: dict[int, Tensor] = {}

        def like(form: _Form) -> Tensor:
            whose, number = next(outputs)
            if whose == GIVEN:
                return form.view(given[number])
            if whose == ELSEWHERE:  # on the host, in a prediction for a GPU: not recorded
                return form.view(form.empty())
            if number not in made:
                made[number] = form.empty()
                self.tracker.follow(made[number].untyped_storage(), first + number, form.storage)
            return form.view(made[number])

        with self.tracker.paused(), torch.no_grad():
            return _map(run.result, like, _Form)

    def _hand_on(self) -> None:
        """Let the tensors that the last run still holds stand for the last copy's blocks, which the next call frees."""
        if not self.runs or self.first == self.runs[-1].first:
            return
        run, tracker = self.runs[-1], self.tracker
        blocks = {run.first + number: self.first + number for number in run.handed_on()}
        for block, size, storage in list(tracker.blocks.values()):
            if block in blocks:
                tracker.follow(storage(), blocks[block], size)

    def _block(self, tensor: Tensor) -> int | None:
        known = self.tracker.blocks.get(tensor.untyped_storage()._cdata)
        return None if known is None else known[0]


def _map(value: Any, function: Callable, kind: type = Tensor) -> Any:
    """`value` with each instance of `kind` in it replaced by `function` of it."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map(each, function, kind) for each in value)
    if isinstance(value, dict):
        return {key: _map(each, function, kind) for key, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(
            **{each.name: _map(getattr(value, each.name), function, kind) for each in fields(value)}
        )
    return value


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def add(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _map(value, add)
    return found


def _given(args: tuple) -> list[Tensor]:
    """The tensors of a call's own micro-batch; its other arguments are the same in every call."""
    return _tensors([each for each in args if isinstance(each, Batch | CachedBatch)])
