"""Records every storage, real or fake, that a program allocates and frees on a device, in order.

What a GPU's operators hold inside is given by formulas (`memory_model/workspaces.py`).
"""

import sys
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import FrameType

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_cmli.fake_cuda.streams import CudaEvent, Stream
from ds_cmli.memory_model import workspaces
from ds_cmli.memory_model.caching_allocator import Event
from ds_cmli.memory_model.gpus import Gpu

aten = torch.ops.aten
# Autograd adds gradients up in place, where the first is no view, but not under a dispatch mode:
# there these operators return a new tensor, and their argument is freed before the next allocation.
ADDED_IN_PLACE = (aten.add.Tensor, aten.index_add.default, aten.index_put.default, aten.scatter.src)
DISPATCHING = ("/torch/_", "/fake_cuda/")  # files that call operators and modes of dispatch


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
    readers: set[Stream] = field(default_factory=set)  # other streams that perhaps still read it


Held = list[tuple[int, int]]  # blocks inside an operator, and their bytes


@dataclass
class Live:
    """A storage that exists now."""

    block: int
    bytes: int
    reference: "weakref.ref[torch.UntypedStorage] | None" = None  # its callback frees the block


class Recorder(TorchDispatchMode):
    """Records while it is entered.

    Args:
        device: the type of device whose memory is recorded.
        gpu: that of a prediction: also record what its operators hold inside.
        workspace_bytes: of cuBLAS; 0: its workspaces were taken before.
    """

    def __init__(self, device: str = "cuda", gpu: Gpu | None = None, workspace_bytes: int = 0):
        super().__init__()
        self.device = device
        self.gpu = gpu
        self.phase = "init"
        # Block, bytes (negative: freed; 0: `Event` says what), phase.
        self.log: list[tuple[int, int, str]] = []
        self.blocks: list[Allocation] = []
        self.live: dict[int, Live] = {}  # by the storage's address
        # What is allocated and freed within one segment was temporary. Each phase is a segment, but
        # a forward pass and its losses are one, and backward is divided where checkpointing begins
        # and ends to recompute a forward pass.
        self.segment = 0
        self.recomputing = False
        # After an operator of ADDED_IN_PLACE in backward, and until the next allocation: the index
        # of the result's allocation in `log`, and the block of the argument.
        self.in_place_at = 0
        self.in_place_of: int | None = None
        self.scoped: str | None = None  # the category of what is allocated now
        # Blocks that have ended, their bytes, and the events that their frees wait for.
        self.pending: list[tuple[int, int, list[CudaEvent]]] = []
        self.workspace_bytes = workspace_bytes
        # Where cuBLAS has a workspace: whether in the thread of backward, and the stream.
        self.with_workspace: set[tuple[bool, int]] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which wraps each call of the method below; nothing is compiled here

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        grad = self.phase == "backward" and torch.is_grad_enabled()
        if grad != self.recomputing:
            self.recomputing = grad
            self.segment += 1
        if func is aten.record_stream.default:
            return self._record_stream(*args)
        inside = workspaces.Inside()
        if self.gpu is not None and func in workspaces.OPERATORS and self._is_on_device(args[0]):
            inside = workspaces.OPERATORS[func](self.gpu, *args)
        held = self._hold([], inside.before, func)
        out = func(*args, **(kwargs or {}))
        if self.gpu is not None:
            out = workspaces.returned(func, args, out)
        if func in ADDED_IN_PLACE:
            held = self._hold(held, ((),), func)  # already, as the result replaces its argument
        num_changes = len(self.log)
        self._record_results(func, out)
        self._hold(held, (*inside.after, ()), func)
        if func in ADDED_IN_PLACE and num_changes < len(self.log) and self._is_accumulating(grad):
            self.in_place_at = num_changes
            self.in_place_of = None if args[0]._is_view() else self.block_of(args[0])
        if self.workspace_bytes and func in workspaces.PRODUCTS:
            self._take_workspace(func)
        return out

    def _take_workspace(self, product: OpOverload) -> None:
        """Record what cuBLAS takes from torch's allocator after the result is allocated.

        The program's thread and that of backward each take a workspace for a stream at their first
        matrix product there, and keep it. From PyTorch 2.15 on each product takes one and returns
        it, and one with a bias takes LT_WORKSPACE.
        """
        place = torch._C._current_graph_task_id() >= 0, Stream.current.stream_id
        if workspaces.KEEPS_WORKSPACES and place in self.with_workspace:
            return
        self.with_workspace.add(place)
        size = self.workspace_bytes
        if product is aten.addmm.default and not workspaces.KEEPS_WORKSPACES:
            size = min(size, workspaces.LT_WORKSPACE)
        # Not a subclass's method: the code that multiplies does not own the workspace.
        block = Recorder._allocate(self, size, "temporaries", "cuBLAS")
        if not workspaces.KEEPS_WORKSPACES:
            self._free(block, size)

    def _is_on_device(self, x: object) -> bool:
        return isinstance(x, Tensor) and x.device.type == self.device

    def _is_accumulating(self, grad: bool) -> bool:
        """Return True if autograd itself, and no function of Python, has called the operator."""
        if self.phase != "backward" or grad:
            return False
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and any(part in frame.f_code.co_filename for part in DISPATCHING):
            frame = frame.f_back
        return frame is None or frame.f_code.co_name == "_engine_run_backward"

    def _hold(self, held: Held, stages: tuple, func: OpOverload) -> Held:
        """Go through the stages of what an operator holds inside; blocks of equal sizes stay."""
        for stage in stages:
            sizes = [size for size in stage if size]
            kept_blocks: dict[int, int] = {}  # by their places in this stage
            end = len(sizes)  # blocks before this one can only take places before `end`
            for block, size in reversed(held):
                places = [place for place in range(end) if sizes[place] == size]
                if places:
                    end = places[-1]
                    kept_blocks[end] = block
                else:
                    self._free_when_read(block, size)
            held = []
            for place, size in enumerate(sizes):
                if place not in kept_blocks:
                    kept_blocks[place] = self._allocate(size, "temporaries", f"{func}, inside")
                held.append((kept_blocks[place], size))
        return held

    def _record_results(self, func: OpOverload, out: object) -> None:
        results = [out] if isinstance(out, Tensor) else tree_leaves(out)
        if func is aten.native_dropout.default:
            results = results[::-1]  # as CUDA allocates them
        for x in results:
            if self._is_on_device(x):
                self._record_tensor(x, None, func)
        if self.gpu is not None and any(map(self._is_on_device, results[:1])) and not func.is_view:
            Stream.current.work.launch()

    def _record_tensor(
        self, tensor: Tensor, category: str | None, op: OpOverload | str = ""
    ) -> None:
        """Record the tensor's storage if it is new or its size has changed."""
        if tensor.layout != torch.strided or tensor._is_zerotensor():
            return
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        live = self.live.get(storage._cdata)
        if live is not None:
            if live.bytes == size:
                return
            self._free_when_read(live.block, live.bytes)
            category = category or self.blocks[live.block].category
            del self.live[storage._cdata]
        if size:
            key = storage._cdata
            live = Live(self._allocate(size, category or self.scoped, op), size)
            live.reference = weakref.ref(storage, lambda _: self._storage_ended(key, live))
            self.live[key] = live

    def _storage_ended(self, key: int, live: Live) -> None:
        if self.live.get(key) is live:
            del self.live[key]
            self._free_when_read(live.block, live.bytes)

    def block_of(self, tensor: Tensor) -> int | None:
        live = self.live.get(tensor.untyped_storage()._cdata)
        return None if live is None else live.block

    def empty_cache(self) -> None:
        """Record that the GPU's allocator returns its free segments."""
        self._allocate(0, "temporaries", "empty_cache")

    def _allocate(self, size: int, category: str | None, op: OpOverload | str) -> int:
        for pending in list(self.pending):
            ended, ended_bytes, events = pending
            if all(event.is_done for event in events):
                self.pending.remove(pending)
                self._free(ended, ended_bytes)
        block = len(self.blocks)
        self.in_place_of = None
        stream = Stream.current.stream_id if self.gpu is not None else 0
        moment = self.phase, self.segment, self.recomputing
        self.blocks.append(Allocation(str(op), *moment, stream, category))
        self.log.append((block, size, self.phase))
        return block

    def _free_when_read(self, block: int, size: int) -> None:
        readers = self.blocks[block].readers
        if readers:
            events = [stream.record_event() for stream in readers]
            self.pending.append((block, size, events))
            self.log.append((block, 0, self.phase))
        else:
            self._free(block, size)

    def _free(self, block: int, size: int) -> None:
        if block == self.in_place_of:
            result, result_bytes, _ = self.log[self.in_place_at]
            if result_bytes == size:
                # Autograd has added in place: the result's allocation is undone, and its storage is
                # that of the block.
                del self.log[self.in_place_at]
                self.in_place_of = None
                for live in self.live.values():
                    if live.block == result:
                        live.block = block
                return
        self.log.append((block, -size, self.phase))
        self.blocks[block].ended = self.segment

    def _record_stream(self, tensor: Tensor, stream: torch.Stream) -> None:
        """Handle `Tensor.record_stream`: keep the block until `stream` has come so far."""
        block = self.block_of(tensor)
        if block is not None and stream.stream_id != self.blocks[block].stream:
            self.blocks[block].readers.add(Stream(number=stream.stream_id))

    def claim(self, category: str, tensors: Iterable[object]) -> None:
        """Assign tensors to `category`; those from before the recording are recorded now."""
        for tensor in tensors:
            if isinstance(tensor, Tensor) and self._is_on_device(tensor):
                self._record_tensor(tensor, category)
                block = self.block_of(tensor)
                if block is not None and self.blocks[block].category is None:
                    self.blocks[block].category = category

    def category(self, block_number: int) -> str:
        """Return the category of a block, as far as it is known now."""
        return self.blocks[block_number].category or "temporaries"

    def events(self) -> list[Event]:
        """Return all changes so far."""
        categories = list(map(self.category, range(len(self.blocks))))
        out = []
        for block, size, phase in self.log:
            allocation = self.blocks[block]
            requests_free = not size and allocation.op != "empty_cache"
            origin = allocation.op, allocation.stream, requests_free
            out.append(Event(block, size, categories[block], phase, *origin))
        return out
