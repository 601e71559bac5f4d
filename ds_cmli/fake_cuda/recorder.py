"""Records every storage that a program allocates and frees on a device, as changes in their order.

Works on real and on fake tensors. What an operator allocates and frees internally is not seen; for
a GPU's operators formulas give it (`memory_model/cuda_operators.py`).
"""

import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_cmli.memory_model import attention_choice, cuda_operators
from ds_cmli.memory_model.blocks import Event
from ds_cmli.memory_model.gpus import Limits
from ds_cmli.memory_model.inside import Inside, Stage

# Autograd accumulates gradients, where the first is no view, and scatters those of maxima in place,
# but not under a dispatch mode: there these operators return a new tensor, and their argument is
# freed before the next allocation.
IN_PLACE = (
    torch.ops.aten.add.Tensor,
    torch.ops.aten.index_add.default,
    torch.ops.aten.index_put.default,
    torch.ops.aten.scatter.src,
    torch.ops.aten.scatter_add.default,
)


@dataclass
class Allocation:
    """A block of memory from its allocation to its end."""

    op: str  # the operator that allocated it
    phase: str  # of its allocation
    segment: int  # of its allocation
    recomputed: bool  # whether checkpointing was recomputing a forward pass
    stream: int  # of a GPU, for which it was allocated
    category: str | None = None  # the first claim stays
    ended: int | None = None  # the segment in which it was freed


class Change(NamedTuple):
    """An allocation, or a free with negative bytes, or with 0 an emptied cache."""

    block: int  # index in `Recorder.blocks`
    bytes: int
    phase: str


class OwnBlocks:
    """The blocks that an operator holds inside, recorded from one stage to the next."""

    def __init__(self, recorder: "Recorder", category: str, op: OpOverload):
        self.recorder, self.category, self.op = recorder, category, f"{op}, inside"
        self.held: list[tuple[int, int]] = []  # each block and its bytes

    def enter(self, stage: Stage) -> None:
        sizes = [size for size in stage if size]
        kept: dict[int, int] = {}  # blocks by their places in this stage
        place = len(sizes)
        for block, size in reversed(self.held):
            if size in sizes[:place]:
                place -= sizes[place - 1 :: -1].index(size) + 1
                kept[place] = block
            else:
                self.recorder._end(block, size)
        self.held.clear()
        for place, size in enumerate(sizes):
            block = kept.get(place, -1)
            if block < 0:
                block = self.recorder._begin(size, self.category, self.op)
            self.held.append((block, size))


class Live(NamedTuple):
    """A storage that exists now."""

    block: int
    bytes: int
    storage: "weakref.ref[torch.UntypedStorage]"


class Recorder(TorchDispatchMode):
    """Records while it is entered.

    Args:
        device: the type of device whose memory is recorded.
        gpu: that of a prediction: also record what its operators hold inside.
        deterministic: whether these are PyTorch's deterministic ones.
    """

    supports_higher_order_operators = True

    def __init__(self, device: str = "cpu", gpu: Limits | None = None, deterministic: bool = False):
        super().__init__()
        self.device, self.gpu, self.deterministic = device, gpu, deterministic
        self.phase, self.recording = "init", True
        self.log: list[Change] = []
        self.blocks: list[Allocation] = []
        self.live: dict[int, Live] = {}  # by the storage's address
        # What is allocated and freed within one segment was temporary. Each phase is a segment, but
        # a forward pass and its losses are one, and backward is divided where checkpointing begins
        # and ends to recompute a forward pass.
        self.segment, self.recomputing = 0, False
        # Of an operator of IN_PLACE in backward, until the next allocation: its result's place in
        # the log, and its argument's block.
        self.in_place_at, self.in_place_of = 0, -1
        self._scope: str | None = None
        self.stream, self.streams = 0, {"": 0}  # the current one, and all of them by name

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # autograd asks for it more often than for operators
        grad = self.phase == "backward" and torch.is_grad_enabled()
        if grad != self.recomputing:
            self.recomputing = grad
            self.segment += 1
        category, inside = "", Inside()
        if self.recording:
            category, inside = self._inside(func, args, kwargs)
        own = OwnBlocks(self, category, func)
        for stage in inside.before:
            own.enter(stage)
        out = func(*args, **(kwargs or {}))
        if self.gpu is not None:
            out = cuda_operators.returned(func, args, out)
        if func in IN_PLACE:
            own.enter(())  # already here, as the result will replace its argument
        place = len(self.log)
        if self.recording:
            self._see_results(func, args, out)
        for stage in inside.after:
            own.enter(stage)
        own.enter(())
        if func in IN_PLACE and place < len(self.log) and self._is_accumulating(grad):
            known = None if args[0]._is_view() else self.block_of(args[0])
            self.in_place_at, self.in_place_of = place, -1 if known is None else known
        return out

    def _is_accumulating(self, grad: bool) -> bool:
        """Whether autograd itself, and no function of the program, has called the operator."""
        return self.phase == "backward" and not grad and _is_autograds()

    def _inside(
        self, func: OpOverload, args: tuple, kwargs: dict[str, object] | None
    ) -> tuple[str, Inside]:
        """The category of what an operator holds beyond its results, and its blocks."""
        if self.gpu is None:
            return "temporaries", Inside()
        fixed = self.deterministic or attention_choice.deterministic()
        inside = cuda_operators.inside(func, args, kwargs, self.gpu, fixed)
        return "temporaries", inside

    def _see_results(
        self, func: OpOverload, args: tuple, out: object, category: str | None = None
    ) -> None:
        results = [out] if isinstance(out, Tensor) else tree_leaves(out)
        if func in cuda_operators.LAST_FIRST:
            results = results[::-1]
        for tensor in results:
            if isinstance(tensor, Tensor):
                self._see(tensor, category, func)

    def _see(self, tensor: Tensor, category: str | None, op: OpOverload | str = "") -> None:
        """Record the tensor's storage if it is new or its size has changed."""
        if tensor.device.type != self.device or tensor.layout != torch.strided:
            return
        if tensor._is_zerotensor():  # of forward-mode differentiation, without memory
            return
        self._see_storage(tensor.untyped_storage(), category, op)

    def _see_storage(
        self, storage: torch.UntypedStorage, category: str | None, op: OpOverload | str = ""
    ) -> None:
        known, size = self.live.get(storage._cdata), storage.nbytes()
        if known is not None:
            if known.bytes == size:
                return
            self._end(known.block, known.bytes)
            category = category or self.blocks[known.block].category
            del self.live[storage._cdata]
        if size:
            self.follow(storage, self._begin(size, category or self._scope, op), size)

    def follow(self, storage: torch.UntypedStorage, block: int, size: int) -> None:
        """From now on, `storage` is that of this block: the block is freed when the storage is."""
        key = storage._cdata
        weak = weakref.ref(storage, lambda _: self._storage_ended(key, block))
        self.live[key] = Live(block, size, weak)

    def _storage_ended(self, key: int, block: int) -> None:
        known = self.live.get(key)
        if known is not None and known.block == block:
            del self.live[key]
            self._end(block, known.bytes)

    def block_of(self, tensor: Tensor) -> int | None:
        known = self.live.get(tensor.untyped_storage()._cdata)
        return None if known is None else known.block

    def another(self, tensor: Tensor) -> Callable[[], None]:
        """Record one more block like that of `tensor`, until the returned function is called."""
        known = self.live.get(tensor.untyped_storage()._cdata)
        if known is None or not self.recording:
            return lambda: None
        model = self.blocks[known.block]
        return partial(self._end, self._begin(known.bytes, model.category, model.op), known.bytes)

    def record_emptied_cache(self) -> None:
        """Record that a GPU's allocator returns its free segments."""
        if self.gpu is not None and self.recording:
            self._begin(0, "temporaries", "empty_cache")

    def _begin(self, size: int, category: str | None, op: OpOverload | str) -> int:
        block, self.in_place_of = len(self.blocks), -1
        self.blocks.append(
            Allocation(str(op), self.phase, self.segment, self.recomputing, self.stream, category)
        )
        self.log.append(Change(block, size, self.phase))
        return block

    def _end(self, block: int, size: int) -> None:
        if block == self.in_place_of and self.log[self.in_place_at].bytes == size:
            self._replace(self.log.pop(self.in_place_at).block, block)
            self.in_place_of = -1
            return
        self.log.append(Change(block, -size, self.phase))
        self.blocks[block].ended = self.segment

    def _replace(self, new: int, block: int) -> None:
        """Let the storage that was recorded as `new` be that of `block`, in place."""
        for live in list(self.live.values()):
            storage = live.storage()
            if live.block == new and storage is not None:
                self.follow(storage, block, live.bytes)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, allocations are not recorded: they happen elsewhere, or not at all on a GPU."""
        before, self.recording = self.recording, False
        try:
            yield
        finally:
            self.recording = before

    def claim(self, category: str, tensors: Iterable[object]) -> None:
        """Assign tensors to `category`; those from before the recording are recorded now."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._see(tensor, category)
                block = self.block_of(tensor)
                if block is not None and self.blocks[block].category is None:
                    self.blocks[block].category = category

    def category(self, number: int) -> str:
        """What a block was for, as far as it is known now."""
        return self.blocks[number].category or "temporaries"

    def events(self) -> list[Event]:
        """All changes so far."""
        categories = list(map(self.category, range(len(self.blocks))))
        out = []
        for block, size, phase in self.log:
            allocation = self.blocks[block]
            op, stream = allocation.op, allocation.stream
            out.append(Event(block, size, categories[block], phase, op, stream))
        return out

    @contextmanager
    def on_stream(self, name: str) -> Iterator[None]:
        """Inside, allocations are for a stream of their own."""
        before = self.stream
        self.stream = self.streams.setdefault(name, len(self.streams))
        try:
            yield
        finally:
            self.stream = before


OURS = os.path.dirname(os.path.realpath(__file__)) + os.sep
TORCH = os.path.dirname(os.path.realpath(torch.__file__)) + os.sep
# Which call operators, and modes of dispatch, by Python.
DISPATCH = tuple(os.path.join(TORCH, name) for name in ("_ops.py", "_compile.py", "_dynamo/"))


def _is_autograds() -> bool:
    """Whether the operator that is dispatched now comes from autograd, not from a function."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _dispatches(frame.f_code.co_filename, frame.f_code.co_name):
        frame = frame.f_back
    return frame is None or frame.f_code.co_name == "_engine_run_backward"


@cache
def _dispatches(filename: str, function: str) -> bool:
    path = os.path.realpath(filename)
    return function == "__torch_dispatch__" or path.startswith((OURS, *DISPATCH))
