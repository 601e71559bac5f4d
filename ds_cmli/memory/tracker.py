"""Records every storage that a training step allocates and frees, as events by category and phase.

Works on real and on fake tensors. Allocations are recorded as they happen; what most of them were
for shows only later (an activation is what outlives the forward pass), so `Tracker.events` decides
the categories at the end. What an operator allocates and frees internally is not seen. It is added
for the all-pairs operator and for collectives, where it is known, for the libraries of the CPU,
where it is measured (`workspace.py`), and for a GPU's operators, where formulas give it
(`allocator/cuda_operators.py`).
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_cmli.allocator import cuda_operators
from ds_cmli.allocator.blocks import Event
from ds_cmli.allocator.gpus import Limits
from ds_cmli.allocator.inside import Inside, Stage
from ds_cmli.common.patches import replaced
from ds_cmli.common.probe import Probe, probe
from ds_cmli.engine import TrainEngine
from ds_cmli.losses.pair_features import PairFeatures
from ds_cmli.memory.owners import HOST, is_offloaded, owners
from ds_cmli.memory.phases import phases
from ds_cmli.memory.workspace import cmli_scratch_bytes, copied_bytes, workspace_bytes

# Autograd accumulates gradients and scatters the gradients of maxima in place, but not under a
# dispatch mode: there these operators return a new tensor, and their argument is freed right
# afterwards.
IN_PLACE = (
    torch.ops.aten.add.Tensor,
    torch.ops.aten.scatter.src,
    torch.ops.aten.scatter_add.default,
)
# Methods of DeepSpeed's optimizers whose allocations belong to the buckets in which gradients are
# reduced.
BUCKET_METHODS = (
    "setup_buckets",
    "reduce_ipg_grads",
    "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads",
)
GATHERS = (
    "allgather_",
    "_allgather_base_",
    "allgather_into_tensor_coalesced_",
    "allgather_coalesced_",
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

    block: int  # index in `Tracker.blocks`
    bytes: int
    phase: str


class OwnBlocks:
    """The blocks that an operator holds inside, recorded from one stage to the next."""

    def __init__(self, tracker: "Tracker", category: str, op: str):
        self.tracker, self.category, self.op = tracker, category, op
        self.held: list[tuple[int, int]] = []  # each block and its bytes

    def enter(self, stage: Stage) -> None:
        sizes = [size for size in stage if size]
        kept = 0
        for (_, size), wanted in zip(self.held, sizes, strict=False):
            if size != wanted:
                break
            kept += 1
        while len(self.held) > kept:
            self.tracker._end(*self.held.pop())
        for size in sizes[kept:]:
            self.held.append((self.tracker._begin(size, self.category, self.op), size))


class Live(NamedTuple):
    """A storage that exists now."""

    block: int
    bytes: int
    storage: "weakref.ref[torch.UntypedStorage]"


class Tracker(TorchDispatchMode, Probe):
    """Records while it is entered: before the model moves to the device; then `attach` the engine.

    Args:
        device: the type of device whose memory is recorded.
        text_lengths: the number of valid tokens of each text, of all ranks or of this one (then the
            same on all); used where the mask is fake, for the all-pairs operator's scratch memory.
            None: the most that any lengths need.
        workspaces: also record what only a CPU holds: memory of libraries inside operators, and
            generator states.
        backend: of the process group, whose copies in collectives are recorded: "gloo", "nccl" or
            "fake".
        gpu: that of a prediction: also record what its operators hold inside.
        deterministic: whether these are PyTorch's deterministic ones.
    """

    def __init__(
        self,
        device: str = "cpu",
        text_lengths: list[int] | None = None,
        workspaces: bool = False,
        backend: str = "fake",
        gpu: Limits | None = None,
        deterministic: bool = False,
    ):
        super().__init__()
        self.device, self.text_lengths = device, text_lengths
        self.workspaces, self.backend = workspaces, backend
        self.gpu, self.deterministic = gpu, deterministic
        self.phase, self.recording = "init", True
        self.log: list[Change] = []
        self.blocks: list[Allocation] = []
        self.live: dict[int, Live] = {}  # by the storage's address
        # What is allocated and freed within one segment was temporary. Each phase is a segment, but
        # a forward pass and its losses are one, and backward is divided where checkpointing begins
        # and ends to recompute a forward pass.
        self.segment, self.last_of_init, self.recomputing = 0, 0, False
        self.in_place_at = 0  # length of the log after the last operator of IN_PLACE in backward
        # The place, among the texts of all ranks, of the first one that the op works on.
        self.first_text = 0
        self._scope: str | None = None
        self.stream, self.streams = 0, {"": 0}  # the current one, and all of them by name
        self._replaced = ExitStack()

    def __enter__(self):
        self._replaced.enter_context(probe.subscribed(self))
        if self.workspaces:
            # Checkpointing saves the generator's state for each layer, and no operator returns it.
            seen = self._seen(torch.get_rng_state)
            self._replaced.enter_context(replaced(torch, "get_rng_state", seen))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._replaced.close()

    # --- recording

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        grad = self.phase == "backward" and torch.is_grad_enabled()
        if grad != self.recomputing:
            self.recomputing = grad
            self.segment += 1
        category, inside = "", Inside()
        if self.recording:
            category, inside = self._inside(func, args, kwargs)
        own = OwnBlocks(self, category, str(func))
        for stage in inside.before:
            own.enter(stage)
        out = func(*args, **(kwargs or {}))
        if self.gpu is not None:
            out = cuda_operators.returned(func, out)
        if func in IN_PLACE:
            own.enter(())  # already here, as the result will replace its argument
        if self.recording:
            self._see_results(func, args, out)
        if func in IN_PLACE and self.phase == "backward" and not grad:
            self.in_place_at = len(self.log)
        for stage in inside.after:
            own.enter(stage)
        own.enter(())
        return out

    def _see_results(self, func: OpOverload, args: tuple, out: object) -> None:
        category = "CMLI op" if func.namespace == "ds_cmli" else None
        results = [out] if isinstance(out, Tensor) else tree_leaves(out)
        if func in cuda_operators.LAST_FIRST:
            results = results[::-1]
        for tensor in results:
            if isinstance(tensor, Tensor):
                self._see(tensor, category, str(func))
        gathers = func.namespace == "c10d" and func._schema.name.split("::")[1] in GATHERS
        if gathers and self._scope is None:  # ZeRO-3 gathers a layer's parameters
            self.claim("parameters", tree_leaves(args[0]))

    def _see(self, tensor: Tensor, category: str | None, op: str = "") -> None:
        """Record the tensor's storage if it is new or its size has changed."""
        if tensor.device.type != self.device or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
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

    def _begin(self, size: int, category: str | None, op: str) -> int:
        block = len(self.blocks)
        allocation = Allocation(
            op, self.phase, self.segment, self.recomputing, self.stream, category
        )
        self.blocks.append(allocation)
        self.log.append(Change(block, size, self.phase))
        return block

    def _end(self, block: int, size: int) -> None:
        end = Change(block, -size, self.phase)
        if len(self.log) == self.in_place_at and self._replaces(block, size):
            self.log.insert(-1, end)
        else:
            self.log.append(end)
        self.blocks[block].ended = self.segment

    def _replaces(self, block: int, size: int) -> bool:
        """Whether the last change allocated another block of this size."""
        return bool(self.log) and self.log[-1].bytes == size and self.log[-1].block != block

    def _inside(
        self, func: OpOverload, args: tuple, kwargs: dict[str, object] | None
    ) -> tuple[str, Inside]:
        """The category of what an operator holds beyond its results, and its blocks."""
        if func.namespace == "ds_cmli":
            texts = self.text_lengths, self.first_text
            scratch = cmli_scratch_bytes(func, args, *texts, self.gpu)
            return "CMLI op", Inside(after=((scratch,),))
        if func.namespace == "c10d":
            return "temporaries", Inside(((copied_bytes(func, args, self.backend),),))
        if self.gpu is not None:
            inside = cuda_operators.inside(func, args, kwargs, self.gpu, self.deterministic)
            return "temporaries", inside
        if self.workspaces:
            return "temporaries", Inside(((workspace_bytes(func, args, kwargs),),))
        return "temporaries", Inside()

    # --- categories

    @contextmanager
    def scope(self, category: str) -> Iterator[None]:
        """Inside, allocations belong to `category`."""
        before, self._scope = self._scope, category
        try:
            with super().scope(category):
                yield
        finally:
            self._scope = before

    @contextmanager
    def on_stream(self, name: str) -> Iterator[None]:
        """Inside, allocations are for a stream of their own."""
        before = self.stream
        self.stream = self.streams.setdefault(name, len(self.streams))
        try:
            yield
        finally:
            self.stream = before

    def texts_from(self, first: int) -> None:
        self.first_text = first
        super().texts_from(first)

    def _seen(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            tensor = function()
            self._see(tensor, None, function.__name__)
            return tensor

        return run

    def _scoped(self, function: Callable, category: str) -> Callable:
        def run(*args, **kwargs):
            with self.scope(category):
                return function(*args, **kwargs)

        return run

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, allocations are not recorded, because they happen on the host."""
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

    def claim_owned(self, train_engine: TrainEngine) -> None:
        """Claim what the models, the engine and its optimizer hold at this moment."""
        for category, tensor in owners(train_engine):
            self.claim(category, [tensor])

    def enter(self, phase: str) -> None:
        if not (self.phase == "forward" and phase == "loss"):
            self.segment += 1
            self.recomputing = False
        self.phase = phase

    @contextmanager
    def attach(self, train_engine: TrainEngine) -> Iterator[None]:
        """Inside, follow the phases of `train_engine`'s steps, and claim the tensors that it
        holds."""
        self.claim_owned(train_engine)
        self.enter("forward")
        self.last_of_init = self.segment - 1

        def enter(phase: str) -> None:
            # When all gradients exist, and after they have been used.
            if phase in ("optimizer", "forward"):
                self.claim_owned(train_engine)
            self.enter(phase)

        with ExitStack() as stack:
            self._follow_optimizer(train_engine, stack)
            kept = train_engine.objective.register_forward_hook(self._claim_cached)
            stack.callback(kept.remove)
            stack.enter_context(phases(train_engine, enter))
            yield

    def _follow_optimizer(self, train_engine: TrainEngine, stack: ExitStack) -> None:
        optimizer, inner = train_engine.engine.optimizer, train_engine.engine.basic_optimizer
        for name in BUCKET_METHODS:
            if hasattr(optimizer, name):
                scoped = self._scoped(getattr(optimizer, name), "ZeRO buckets")
                stack.enter_context(replaced(optimizer, name, scoped))
        name = "reduce_ready_partitions_and_remove_grads"
        if hasattr(optimizer, name):
            reduce = getattr(optimizer, name)

            def claim_first(parameter: nn.Parameter, *args: object, **kwargs: object) -> None:
                # Each gradient has a separate storage only until it is copied into a bucket.
                self.claim("gradients", [parameter.grad])
                return reduce(parameter, *args, **kwargs)

            stack.enter_context(replaced(optimizer, name, claim_first))
        if is_offloaded(optimizer):
            stack.enter_context(replaced(inner, "step", self._scoped(inner.step, HOST)))

    @contextmanager
    def attach_to_training(self, train_engine: TrainEngine) -> Iterator[None]:
        """Follow it as `attach` does; each batch that the objective gets is claimed as "data"."""

        def claim_batch(module: nn.Module, inputs: tuple) -> None:
            if hasattr(inputs[0], "batch"):
                self.claim("data", vars(inputs[0].batch).values())

        hook = train_engine.objective.register_forward_pre_hook(claim_batch)
        try:
            with self.attach(train_engine):
                yield
        finally:
            hook.remove()

    def _claim_cached(self, module: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(output, PairFeatures):
            self.claim("cached features", output.tensors())

    def _category(self, block: Allocation) -> str:
        if block.category is not None:
            return block.category
        if block.phase in ("forward", "loss") or block.recomputed:
            if block.ended == block.segment:
                return "temporaries"
            return "activations student"
        if block.phase == "init" and (block.ended is None or block.ended > self.last_of_init):
            return "ZeRO buckets"  # what the engine allocates once and keeps
        return "temporaries"

    def events(self, host: bool = True) -> list[Event]:
        """All recorded events. `host`: include what an offloaded optimizer keeps in host memory."""
        categories = [self._category(block) for block in self.blocks]
        events = []
        for block, size, phase in self.log:
            category = categories[block]
            if category == HOST:
                if not host:
                    continue
                category = "optimizer states"
            allocation = self.blocks[block]
            events.append(Event(block, size, category, phase, allocation.op, allocation.stream))
        return events
