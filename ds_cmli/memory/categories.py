"""The purpose of a training step's memory: the recorder's blocks by phase and category.

A table of owners is read three times in a step: when the engine is built, when all gradients exist,
and when the weights have been updated. Blocks that nobody owned then are named after what allocated
them: a scope that training enters (the teacher, an exchange, a batch), or the file of the code. Of
the rest, what outlives the forward pass is an activation.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch.distributed as dist
from torch import nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from ds_cmli import scopes
from ds_cmli.engine import TrainEngine
from ds_cmli.fake_cuda.recorder import Recorder
from ds_cmli.memory_model.gpus import Gpu

# The phase that begins at a phase's end.
NEXT_PHASE = {"backward": "optimizer", "optimizer": "forward"}
# Attributes of DeepSpeed's optimizers, stages 1 to 3, that hold tensors.
PARAMETERS = (
    "bit16_groups_flat fp16_partitioned_groups_flat fp16_groups_flat bf16_groups_flat "
    "lp_param_buffer"
)
MASTERS = "single_partition_of_fp32_groups fp32_partitioned_groups_flat fp32_groups_flat_partition"
GRADIENTS = (
    "averaged_gradients all_grad_tensors grad_partitions_flat_buffer fp32_groups_gradients_flat"
)
# Functions in these files stand between an operator and the code that calls it; the second one is
# `functional.linear` under ZeRO-3.
SKIPPED_FILES = ("/torch/", "/fake_cuda/", "deepspeed/runtime/zero/linear.py", __file__)
# Categories of what code in these files allocates, and nobody owns.
CATEGORY_BY_FILE = {
    "ds_cmli/cmli/op.py": "CMLI op",
    "ds_cmli/cmli/sides.py": "CMLI op",
    "ds_cmli/cmli/triton_": "CMLI op",
    "ds_cmli/cmli/fallback.py": "CMLI op",
    "ds_cmli/losses/gradient_cache.py": "cached features",  # and their gradients
    "deepspeed/runtime/zero/partition_parameters.py": "parameters",  # gathered, ZeRO-3
    "deepspeed/runtime/zero/": "ZeRO buckets",
}


def owners(train_engine: TrainEngine) -> Iterator[tuple[str, object]]:
    """Yield categories and their tensors, nested; the first category of a storage counts."""
    teacher = train_engine.teacher
    module = train_engine.engine.module
    optimizer = train_engine.engine.optimizer
    inner = train_engine.engine.basic_optimizer

    def attributes(names: str) -> list[object]:
        return [getattr(optimizer, name, None) for name in names.split()]

    parameters = list(module.parameters())
    # Without master weights the optimizer holds the module's own parameters.
    updated = tree_leaves([[group["params"] for group in inner.param_groups], attributes(MASTERS)])
    if teacher is not None:
        yield "teacher", [*teacher.parameters(), *teacher.buffers()]
    yield "parameters", [*parameters, *module.buffers(), *attributes(PARAMETERS)]
    yield "parameters", [getattr(p, "ds_tensor", None) for p in parameters]  # this rank's, ZeRO-3
    yield "gradients", [(p.grad, getattr(p, "grad_accum", None)) for p in parameters]
    yield "master weights", updated
    yield "gradients", [getattr(p, "grad", None) for p in updated]
    yield "gradients", attributes(GRADIENTS)
    if train_engine.ema is not None:
        yield "EMA weights", train_engine.ema.averages
    yield "optimizer states", list(inner.state.values())


class TrainingRecorder(Recorder):
    """Records the trainer's step: enter it before the engine is built, then `attach` the engine.

    Args:
        device, gpu, workspace_bytes: as in `Recorder`.
    """

    def __init__(self, device: str = "cuda", gpu: Gpu | None = None, workspace_bytes: int = 0):
        super().__init__(device, gpu, workspace_bytes)
        self.last_init_segment = 0  # the last segment before the first step
        self.category_by_block: dict[int, str] = {}  # by CATEGORY_BY_FILE

    @contextmanager
    def attach(self, train_engine: TrainEngine) -> Iterator[None]:
        """Inside, follow the phases of the engine's steps, and read what it owns."""
        self.train_engine = train_engine
        self.last_init_segment = self.segment

        def before_student(*_: object) -> None:
            if self.phase != "forward":  # gradient caching runs several, with no update between
                self.begin("forward")

        student = train_engine.objective.student
        self.begin("forward")
        with (
            student.register_forward_pre_hook(before_student),
            student.register_forward_hook(lambda *_: self.begin("loss")),
            train_engine.objective.register_forward_hook(self._claim_cached),
            scopes.subscribed(self.scope),
        ):
            yield
        # NCCL connects each as it is made: DeepSpeed clones that of all ranks.
        self.num_process_groups = dist.get_pg_count()

    def _claim_cached(self, module: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(output, dict):
            self.claim("cached features", output.values())

    # --- phases

    def begin(self, phase: str) -> None:
        if phase in ("forward", "optimizer"):  # the weights are updated; all gradients exist
            for category, held in owners(self.train_engine):
                self.claim(category, tree_leaves(held))
        # Blocks that end in the segment of their allocation were temporary. Forward and losses
        # are one segment.
        self.segment += not (self.phase == "forward" and phase == "loss")
        self.phase = phase
        self.recomputing = False

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Mark a phase of the step, or the category of the allocations inside."""
        previous = self.scope_category
        if name in NEXT_PHASE:
            self.begin(name)
        else:
            self.scope_category = "exchanged text" if name == "exchange" else name
        try:
            yield
        finally:
            self.scope_category = previous
            if name in NEXT_PHASE:
                self.begin(NEXT_PHASE[name])

    # --- categories

    def _allocate(self, size: int, category: str | None, op: OpOverload | str) -> int:
        if category is None or category == "temporaries":
            file = self._allocating_file()
            names = [name for part, name in CATEGORY_BY_FILE.items() if part in file]
            # Blocks of the engine's construction that stay are claimed by `owners`.
            if names and (self.phase != "init" or names[0] == "ZeRO buckets"):
                self.category_by_block[len(self.allocations)] = names[0]
        return super()._allocate(size, category, op)

    def category(self, block_number: int) -> str:
        block = self.allocations[block_number]
        category = block.category
        if category is None or category == "temporaries":
            category = self.category_by_block.get(block_number, category)
        if category is not None:
            return category
        temporary = block.ended == block.segment
        if (block.phase in ("forward", "loss") or block.recomputed) and not temporary:
            return "activations student"
        if block.phase == "init" and (block.ended is None or block.ended > self.last_init_segment):
            return "ZeRO buckets"  # what the engine allocates once and keeps
        return "temporaries"

    def _allocating_file(self) -> str:
        """Return the innermost Python file that is none of SKIPPED_FILES.

        In backward "" is autograd itself, whose caller says nothing.
        """
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            file = frame.f_code.co_filename
            if self.phase == "backward" and frame.f_code.co_name == "_engine_run_backward":
                return ""
            if not any(part in file for part in SKIPPED_FILES):
                return file
            frame = frame.f_back
        return ""
