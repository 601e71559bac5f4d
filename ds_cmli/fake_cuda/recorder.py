"""Records every storage, real or fake, that a program allocates and frees on a device, in order.

The scratch memory of a GPU's operators comes from formulas (`memory_model/workspaces.py`).
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
# Without a dispatch mode autograd adds a gradient to the first one in place, unless that is a view.
# Under a mode it calls these operators instead: they return a new tensor, and their argument is
# freed before the next allocation.
ADDED_IN_PLACE = (aten.add.Tensor, aten.index_add.default, aten.index_put.default, aten.scatter.src)
# Parts of the paths of files whose functions stand between autograd and `__torch_dispatch__`.
DISPATCHING = ("/torch/_", "/fake_cuda/")


@dataclass
class Allocation:
    """A block of memory from its allocation to its end."""

    op: str  # the operator that allocated it
    phase: str  # the phase in which it was allocated
    segment: int  # the segment in which it was allocated
    recomputed: bool  # allocated while checkpointing recomputed a forward pass
    stream: int  # the stream for which it was allocated
    category: str | None = None  # set by the first claim; later ones do not change it
    ended: int | None = None  # the segment in which it was freed
    readers: set[Stream] = field(default_factory=set)  # other streams that may still read it


ScratchBlocks = list[tuple[int, int]]  # (index in `Recorder.allocations`, bytes) of each


@dataclass
class Live:
    """A storage that exists now."""

    block: int  # its index in `Recorder.allocations`
    bytes: int
    reference: "weakref.ref[torch.UntypedStorage] | None" = None  # its callback frees the block


class Recorder(TorchDispatchMode):
    """Records while it is entered.

    Args:
        device: the type of device whose memory is recorded.
        gpu: the GPU of a prediction, for which scratch memory is recorded too; None: no prediction.
        workspace_bytes: the size of a cuBLAS workspace; 0: cuBLAS took its workspaces before.
    """

    def __init__(self, device: str = "cuda", gpu: Gpu | None = None, workspace_bytes: int = 0):
        super().__init__()
        self.device = device
        self.gpu = gpu
        self.phase = "init"
        # (block, bytes, phase) of each change; bytes as in `Event`: negative for a free.
        self.log: list[tuple[int, int, str]] = []
        self.allocations: list[Allocation] = []
        self.live: dict[int, Live] = {}  # by the storage's address
        # What is allocated and freed within one segment was temporary. Each phase is a segment, but
        # a forward pass and its losses are one, and backward is divided where checkpointing begins
        # and ends to recompute a forward pass.
        self.segment = 0
        self.recomputing = False
        # Set by an operator of ADDED_IN_PLACE that autograd calls: if its argument is freed before
        # the next allocation, `_free` takes the result's allocation back out of `log`.
        self.result_index = 0  # of the result's allocation in `log`
        self.argument_block: int | None = None  # None: there is nothing to take back
        self.scope_category: str | None = None  # the category of what is allocated now
        # (block, bytes, events) of blocks that are to be freed when all these events are done.
        self.pending_frees: list[tuple[int, int, list[CudaEvent]]] = []
        self.workspace_bytes = workspace_bytes
        # (is it the thread of backward, stream) for which cuBLAS has a workspace.
        self.places_with_workspace: set[tuple[bool, int]] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would wrap each call of `__torch_dispatch__`; nothing is compiled here

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Checkpointing turns gradients on in backward while it recomputes a forward pass.
        recomputing = self.phase == "backward" and torch.is_grad_enabled()
        if recomputing != self.recomputing:
            self.recomputing = recomputing
            self.segment += 1
        if func is aten.record_stream.default:
            return self._record_stream(*args)
        scratch = workspaces.Scratch()
        if self.gpu is not None and func in workspaces.FORMULAS and self._is_on_device(args[0]):
            scratch = workspaces.FORMULAS[func](self.gpu, *args)
        held = self._pass_stages([], scratch.before, func)
        out = func(*args, **(kwargs or {}))
        if self.gpu is not None:
            out = workspaces.cuda_result(func, args, out)
        if func in ADDED_IN_PLACE:
            # Free scratch blocks first: the result may take the place of the argument.
            held = self._pass_stages(held, ((),), func)
        result_index = len(self.log)
        self._record_results(func, out)
        self._pass_stages(held, (*scratch.after, ()), func)
        is_recorded = result_index < len(self.log)
        if func in ADDED_IN_PLACE and is_recorded and self._is_accumulating():
            self.result_index = result_index
            self.argument_block = None if args[0]._is_view() else self.block_of(args[0])
        if self.workspace_bytes and func in workspaces.PRODUCTS:
            self._take_workspace(func)
        return out

    def _take_workspace(self, product: OpOverload) -> None:
        """Record what cuBLAS takes from torch's allocator after the result is allocated.

        The program's thread and that of backward each take a workspace at their first product on a
        stream, and keep it. From PyTorch 2.15 on every product takes a workspace and returns it,
        of at most LT_WORKSPACE bytes for a product with a bias.
        """
        place = torch._C._current_graph_task_id() >= 0, Stream.current.stream_id
        if workspaces.KEEPS_WORKSPACES and place in self.places_with_workspace:
            return
        self.places_with_workspace.add(place)
        size = self.workspace_bytes
        if product is aten.addmm.default and not workspaces.KEEPS_WORKSPACES:
            size = min(size, workspaces.LT_WORKSPACE)
        # Not `self._allocate`: TrainingRecorder's takes the category from the code that allocates,
        # here the code that multiplies.
        block = Recorder._allocate(self, size, "temporaries", "cuBLAS")
        if not workspaces.KEEPS_WORKSPACES:
            self._free(block, size)

    def _is_on_device(self, x: object) -> bool:
        return isinstance(x, Tensor) and x.device.type == self.device

    def _is_accumulating(self) -> bool:
        """Return True if autograd itself, and no function of Python, has called the operator."""
        if self.phase != "backward" or self.recomputing:
            return False
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and any(part in frame.f_code.co_filename for part in DISPATCHING):
            frame = frame.f_back
        return frame is None or frame.f_code.co_name == "_engine_run_backward"

    def _pass_stages(self, held: ScratchBlocks, stages: tuple, func: OpOverload) -> ScratchBlocks:
        """Free and allocate an operator's scratch blocks, stage by stage; return those of the last.

        `held`: the scratch blocks that are allocated now. A block stays allocated if the next stage
        has one of equal size; blocks that stay keep their order.
        """
        for stage in stages:
            sizes = [size for size in stage if size]
            kept_blocks: dict[int, int] = {}  # by their places in this stage
            # The last block chooses first. Each block's place is below `end`, which is the place of
            # the block that stays after it.
            end = len(sizes)
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
        has_kernel = any(map(self._is_on_device, results[:1])) and not func.is_view
        if self.gpu is not None and has_kernel:
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
            category = category or self.allocations[live.block].category
            del self.live[storage._cdata]
        if size:
            key = storage._cdata
            live = Live(self._allocate(size, category or self.scope_category, op), size)
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
        # PyTorch's allocator completes the frees whose readers are done before it allocates.
        for pending in list(self.pending_frees):
            ended_block, ended_bytes, events = pending
            if all(event.is_done for event in events):
                self.pending_frees.remove(pending)
                self._free(ended_block, ended_bytes)
        block = len(self.allocations)
        self.argument_block = None
        stream = Stream.current.stream_id if self.gpu is not None else 0
        self.allocations.append(
            Allocation(str(op), self.phase, self.segment, self.recomputing, stream, category)
        )
        self.log.append((block, size, self.phase))
        return block

    def _free_when_read(self, block: int, size: int) -> None:
        """Free a block: now, or when the streams that may read it have done what was launched."""
        readers = self.allocations[block].readers
        if readers:
            events = [stream.record_event() for stream in readers]
            self.pending_frees.append((block, size, events))
            self.log.append((block, 0, self.phase))  # the request, as in `Event`
        else:
            self._free(block, size)

    def _free(self, block: int, size: int) -> None:
        if block == self.argument_block:
            result_block, result_bytes, _ = self.log[self.result_index]
            if result_bytes == size:
                # Without this mode autograd would have added in place: the result has not been
                # allocated, and its storage uses the argument's block.
                del self.log[self.result_index]
                self.argument_block = None
                for live in self.live.values():
                    if live.block == result_block:
                        live.block = block
                return
        self.log.append((block, -size, self.phase))
        self.allocations[block].ended = self.segment

    def _record_stream(self, tensor: Tensor, stream: torch.Stream) -> None:
        """Handle `Tensor.record_stream`: a free of the block waits for what `stream` does."""
        block = self.block_of(tensor)
        if block is not None and stream.stream_id != self.allocations[block].stream:
            self.allocations[block].readers.add(Stream(number=stream.stream_id))

    def claim(self, category: str, tensors: Iterable[object]) -> None:
        """Assign tensors to `category`; those from before the recording are recorded now."""
        for tensor in tensors:
            if isinstance(tensor, Tensor) and self._is_on_device(tensor):
                self._record_tensor(tensor, category)
                block = self.block_of(tensor)
                if block is not None and self.allocations[block].category is None:
                    self.allocations[block].category = category

    def category(self, block_number: int) -> str:
        """Return the category of a block, as far as it is known now."""
        return self.allocations[block_number].category or "temporaries"

    def events(self) -> list[Event]:
        """Return all allocations and frees so far, with the categories that are known now."""
        out = []
        for block, size, phase in self.log:
            category = self.category(block)
            op = self.allocations[block].op
            stream = self.allocations[block].stream
            requests_free = not size and op != "empty_cache"
            out.append(Event(block, size, category, phase, op, stream, requests_free))
        return out
