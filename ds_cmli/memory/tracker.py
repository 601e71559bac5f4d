"""Records every storage that a training step allocates and frees, as events by category and phase.

Works on real and on fake tensors. Allocations are recorded as they happen; what most of them were
for shows only later (an activation is what outlives the forward pass), so `MemoryTracker.events`
decides the categories at the end. What operators allocate and free internally is not seen. It is
added for collectives, where it is known, for the libraries of the CPU, where it is measured
(`workspace.py`), and for a GPU's operators, where formulas give it
(`memory_model/cuda_operators.py`).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from ds_cmli.cmli import op, triton_backward, triton_forward
from ds_cmli.common.patches import replaced
from ds_cmli.common.probe import Probe, probe
from ds_cmli.data.batch import Batch
from ds_cmli.engine import TrainEngine
from ds_cmli.fake_cuda.recorder import Recorder
from ds_cmli.memory.owners import HOST, is_offloaded, owners
from ds_cmli.memory.workspace import copied_bytes, workspace_bytes
from ds_cmli.memory_model.blocks import Event
from ds_cmli.memory_model.gpus import Limits
from ds_cmli.memory_model.inside import Inside

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
CMLI = "CMLI op"  # the category
AFTER = {"backward": "optimizer", "optimizer": "forward"}  # the phase that begins at a phase's end


class _Phases(Probe):
    def __init__(self, enter: Callable[[str], None]):
        self.enter, self.now = enter, ""

    def begin(self, phase: str) -> None:
        self.now = phase
        self.enter(phase)

    @contextmanager
    def step_phase(self, name: str) -> Iterator[None]:
        self.begin(name)
        try:
            with super().step_phase(name):
                yield
        finally:
            self.begin(AFTER[name])

    def before_student(self, *_: object) -> None:
        # Gradient caching runs several forward passes with no update between them.
        if self.now != "forward":
            self.begin("forward")


@contextmanager
def phases(train_engine: TrainEngine, enter: Callable[[str], None]) -> Iterator[None]:
    """Inside, call `enter` with "forward", "loss", "backward" or "optimizer" as that phase
    begins."""
    student, reported = train_engine.objective.student, _Phases(enter)
    reported.begin("forward")
    with (
        probe.subscribed(reported),
        student.register_forward_pre_hook(reported.before_student),
        student.register_forward_hook(lambda *_: reported.begin("loss")),
    ):
        yield


class MemoryTracker(Recorder, Probe):
    """Records while it is entered: before the model moves to the device; then `attach` the engine.

    Args:
        device: the type of device whose memory is recorded.
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
        workspaces: bool = False,
        backend: str = "fake",
        gpu: Limits | None = None,
        deterministic: bool = False,
    ):
        super().__init__(device, gpu, deterministic)
        self.workspaces, self.backend = workspaces, backend
        self.cuda = device == "cuda" or gpu is not None
        self.last_of_init = 0
        self._replaced = ExitStack()

    def __enter__(self):
        self._replaced.enter_context(probe.subscribed(self))
        if self.workspaces:
            # Checkpointing saves the generator's state for each layer, and no operator returns it.
            seen = self._seen(torch.get_rng_state)
            self._replaced.enter_context(replaced(torch, "get_rng_state", seen))
        for name in ("cmli_forward", "cmli_backward"):
            scoped = self._scoped(getattr(op, name), CMLI)
            self._replaced.enter_context(replaced(op, name, scoped))
        if self.gpu is not None:  # whose tiles the kernels take
            limits = self.gpu.capability, self.gpu.shared
            for module in (triton_forward, triton_backward):
                known = replaced(module, "device_limits", lambda _: limits)
                self._replaced.enter_context(known)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._replaced.close()

    # --- recording

    def _see_results(
        self, func: OpOverload, args: tuple, out: object, category: str | None = None
    ) -> None:
        super()._see_results(func, args, out, category)
        gathers = func.namespace == "c10d" and func._schema.name.split("::")[1] in GATHERS
        if gathers and self._scope is None:  # ZeRO-3 gathers a layer's parameters
            self.claim("parameters", tree_leaves(args[0]))

    def _inside(
        self, func: OpOverload, args: tuple, kwargs: dict[str, object] | None
    ) -> tuple[str, Inside]:
        """The category of what an operator holds beyond its results, and its blocks."""
        category = CMLI if self._scope == CMLI else "temporaries"
        if func.namespace == "c10d":
            return category, Inside(((copied_bytes(func, args, self.backend),),))
        if self.gpu is None and self.workspaces:
            return category, Inside(((workspace_bytes(func, args, kwargs),),))
        return category, super()._inside(func, args, kwargs)[1]

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
    def exchanging(self) -> Iterator[None]:
        with self.scope("exchanged text"), super().exchanging():
            yield

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

    def claim_owned(self, train_engine: TrainEngine) -> None:
        """Claim what the models, the engine and its optimizer hold at this moment."""
        for category, held in owners(train_engine):
            self.claim(category, tree_leaves(held))

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
            stack.enter_context(train_engine.objective.register_forward_hook(self._claim_cached))
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
            for batch in inputs:
                if isinstance(batch, Batch):
                    self.claim("data", vars(batch).values())

        hook = train_engine.objective.register_forward_pre_hook(claim_batch)
        with hook, self.attach(train_engine):
            yield

    def _claim_cached(self, module: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(output, dict):
            self.claim("cached features", output.values())

    def category(self, number: int) -> str:
        block = self.blocks[number]
        if block.category is not None:
            return block.category
        temporary = block.ended == block.segment
        if (block.phase in ("forward", "loss") or block.recomputed) and not temporary:
            return "activations student"
        if block.phase == "init" and (block.ended is None or block.ended > self.last_of_init):
            return "ZeRO buckets"  # what the engine allocates once and keeps
        return "temporaries"

    def events(self) -> list[Event]:
        """All changes; of what an offloaded optimizer keeps on the host only where a CPU trains."""
        out = []
        for event in super().events():
            if event.category != HOST:
                out.append(event)
            elif not self.cuda:
                out.append(replace(event, category="optimizer states"))
        return out
