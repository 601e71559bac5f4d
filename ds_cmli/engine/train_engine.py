"""Builds student, teacher, losses and DeepSpeed's engine from a configuration, and runs training steps.

This is the only place where a training step is put together: training, profiling and prediction all use it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ds_cmli.cmli.token_keep import kept
from ds_cmli.common import quiet
from ds_cmli.common.errors import UserError
from ds_cmli.common.patches import patch_for_good
from ds_cmli.common.processor import keep_freed_memory
from ds_cmli.config import schedule
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import Config
from ds_cmli.data import Batch
from ds_cmli.data.tokens import SpecialTokens
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import gradient_caching
from ds_cmli.engine.ema import EMA
from ds_cmli.engine.parameter_groups import freeze, parameter_groups
from ds_cmli.engine.planning import compares_all, resolve_weights
from ds_cmli.engine.result import MicroBatchLosses
from ds_cmli.engine.throughput import ModelFlops, StepTimer
from ds_cmli.faults import nonfinite
from ds_cmli.losses import LOSSES, needs_teacher
from ds_cmli.losses.objective import Objective
from ds_cmli.models.backbone import cast_statistics
from ds_cmli.models.checkpointing import checkpoint_blocks
from ds_cmli.models.compiling import compile_blocks
from ds_cmli.models.student import Student
from ds_cmli.models.teacher import Teacher

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def build_models(
    config: Config, vocab_size: int, pretrained: bool = True, special: SpecialTokens | None = None
) -> tuple[Objective, Teacher | None]:
    """The student with its losses, and the teacher if a loss needs it; on the CPU, in fp32, equal on every rank.

    `pretrained=False`: the student's weights are random, because they will be overwritten. `special`: as in `Student`.
    """
    config = resolve_weights(config)
    torch.manual_seed(config.run.seed)
    data = config.data
    student = Student(config.student, data.image_size, vocab_size, data.context_length, pretrained, special)
    teacher = None
    if needs_teacher(config.loss.weights):
        teacher = Teacher(config.teacher, data.image_size, student.grid)
    objective = Objective(student, config.loss, teacher.width if teacher else None)
    freeze(objective, config)
    return objective, teacher


def use_no_compiler() -> None:
    """On a CPU, keep DeepSpeed from compiling its shared-memory collectives, which takes minutes at the first start."""
    if not torch.cuda.is_available():
        # The whole table is replaced, because DeepSpeed would run compilers to fill it.
        patch_for_good("deepspeed: compiled operators", {})


@dataclass
class TrainEngine:
    engine: Any  # deepspeed.DeepSpeedEngine around the objective
    objective: Objective
    teacher: Teacher | None
    device: torch.device
    dtype: torch.dtype
    names: list[list[str]]  # the parameters' names, in the order of the optimizer's groups
    lr_factor: float = 1.0  # the factor of the first group's learning rate
    accumulation: int = 1  # micro-batches per step
    caching: bool = False  # gradient caching: negatives from all micro-batches of a step
    cache_on_host: bool = False  # gradient caching keeps the features on the host
    reduce_once: bool = False  # reduce gradients once per step, not after each micro-batch
    timer: StepTimer | None = None  # None: neither time nor the model's FLOPs are measured
    flops: dict[int, float] = field(default_factory=dict)  # FLOPs of a micro-batch, by the padded length of its texts
    ema: EMA | None = None
    compiled: bool = False  # if true, the model's FLOPs are not counted
    lr: float = 0.0  # the learning rate of the last update, for a group whose factor is 1

    def step(
        self, micro_batches: Sequence[Batch], heartbeat: Callable[[], None] = lambda: None
    ) -> list[MicroBatchLosses]:
        """Run one optimizer step. Collective.

        Args:
            micro_batches: this rank's `accumulation` micro-batches; each is moved to the device when its turn comes.
            heartbeat: called again and again during a step with gradient caching.
        """
        once = self.reduce_once and self.engine.zero_optimization_stage() >= 2  # at 0 and 1 DeepSpeed does so anyway
        reduced = self._reduced_once() if once else nullcontext()
        update = (lambda: None) if once else self._update
        with reduced:
            if self.caching:
                found = gradient_caching.backward(self, micro_batches, update, heartbeat)  # collectives
            else:
                found = []
                for batch in micro_batches:
                    found.append(self._backward(batch))  # collectives
                    update()  # collectives
        if once:
            for _ in found:  # the engine counts micro-batches, and updates the weights at the last one
                self._update()  # collectives
        return found

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Run forward and backward of one micro-batch, with its own negatives; update at the end of accumulation.

        Returns the weighted loss and each loss by name for this rank's pairs, fp32 scalars without a graph. Collective.
        """
        found = self._backward(batch)  # collectives
        self._update()  # collectives
        return found.total, found.each

    def _backward(self, batch: Batch) -> MicroBatchLosses:
        # The copy from pinned memory is not waited for: it runs while the GPU works.
        index, batch = batch.index, batch.to(self.device, non_blocking=True)
        # Collectives: text features, column statistics.
        total, each = self.forward(batch, lambda targets: self.engine(batch, targets))
        self.go_backward(total)  # collectives: text gradients, gradient buckets
        return MicroBatchLosses(index, total.detach(), each, self.objective.ignored / len(index))

    def go_backward(self, total: Tensor) -> None:
        """Run backward from a micro-batch's weighted loss; if it is not finite, all gradients are NaN. Collective."""
        self.mark("backward")
        self.engine.backward(nonfinite.poison(total) * self.missing_scale)

    def _update(self) -> None:
        self.lr = self.engine.get_lr()[0] / self.lr_factor  # this update's: `engine.step` sets the next one's
        self.mark("step")
        self.engine.step()  # collectives and a CPU-GPU sync: overflow check, gradient norm, updated weights
        if self.ema is not None and self.engine.was_step_applied():
            self.ema.update()
        self.mark(None)

    @contextmanager
    def _reduced_once(self) -> Iterator[None]:
        """Inside, gradients stay on this rank; at the end they are reduced. Collective."""
        block = self.engine.coalesce_grad_reduction()
        block.__enter__()
        try:
            yield
        except BaseException:
            self._unfinished = block  # kept, as its end would reduce gradients, which the other ranks do not
            raise
        block.__exit__(None, None, None)  # collectives

    @property
    def scale(self) -> float:
        """The loss scale: backward passes multiply the gradients by it, which keeps fp16 gradients from vanishing."""
        if self.dtype != torch.float16:
            return 1.0
        return float(self.engine.optimizer.loss_scale)

    def forward(self, batch: Batch, student: Callable[[Any], Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the teacher, and then `student` with the teacher's targets.

        If time is measured, FLOPs are counted for the first batch of each padded text length.
        """
        self.mark("forward")
        positions = batch.input_ids.shape[1]
        if self.timer is None or self.compiled or positions in self.flops:
            out = student(self.teacher(batch.image) if self.teacher is not None else None)
        else:
            with ModelFlops(trained=False) as teacher_flops:
                targets = self.teacher(batch.image) if self.teacher is not None else None
            with ModelFlops(trained=True) as student_flops:
                out = student(targets)
            self.flops[positions] = teacher_flops.flops + student_flops.flops + self._all_pairs_flops(batch)
        if self.timer is not None:
            self.timer.flops += self.flops.get(positions, 0.0)
        return out

    def _all_pairs_flops(self, batch: Batch) -> float:
        """FLOPs of the all-pairs operator, into which `ModelFlops` does not see: those of the similarities, and as many
        again for the gradient of each side."""
        if not any(LOSSES[name].scores == "cmli" for name in self.objective.losses):
            return 0.0
        (B, M), (rows, columns) = batch.input_ids.shape, self.objective.student.grid
        G = B * distributed.world_size() * (self.accumulation if self.caching else 1)
        D, share = self.objective.student.projection.out_features, self.objective.config.cmli_token_keep
        return 3 * 2.0 * B * G * kept(share, rows * columns) * kept(share, M) * D

    def mark(self, phase: str | None) -> None:
        if self.timer is not None:
            self.timer.mark(phase)

    @property
    def missing_scale(self) -> float:
        """The loss scale where DeepSpeed (0.19.8) does not multiply by it, only divides: in 16 bit without ZeRO."""
        config = getattr(self.engine.optimizer, "loss_scale_config", None)
        return 1.0 if config is None else config.cur_scale

    @property
    def skipped(self) -> bool:
        """Whether the last step's update was skipped, on all ranks, because something was not finite."""
        return not self.engine.was_step_applied()

    def state(self) -> dict[str, float]:
        """The last update's learning rate and gradient norm, the loss scale (with the number of skipped steps) in fp16,
        and the temperatures. CPU-GPU sync; collective under ZeRO-3."""
        optimizer = self.engine.optimizer
        out = {"lr": self.lr}
        norm = self.engine.get_global_grad_norm()
        if norm is not None:
            out["grad_norm"] = float(norm) / self.missing_scale
        if self.dtype == torch.float16:
            out["loss_scale"] = float(optimizer.loss_scale)
            out["skipped_steps"] = self.engine.skipped_steps
        for name, scale in self.objective.scales().items():
            out[f"temperature/{name}"] = 1 / scale if scale else math.inf  # infinite if the scale was learned down to 0
        return out


def build(
    config: Config,
    ds_config: DeepSpeedConfig,
    vocab_size: int,
    total_steps: int,
    device: torch.device,
    special: SpecialTokens | None = None,
) -> TrainEngine:
    """Build the engine around student and losses, ready to train. Collective.

    Args:
        ds_config: the JSON after `on_this_device` and `filled`.
        vocab_size: the tokenizer's.
        total_steps: optimizer steps of the whole run, for the learning rate schedule.
        device: this rank's device; the process group must be initialised.
        special: the tokens that the tokenizer adds; None: those of the built-in one.
    """
    import deepspeed

    use_no_compiler()
    if device.type == "cpu":
        keep_freed_memory()
    if ds_config.prints:
        quiet.let_deepspeed_print(ds_config.get("log_level") is None)
    deepspeed.init_distributed(verbose=False)
    dtype = DTYPES[ds_config.precision]
    objective, teacher = build_models(config, vocab_size, special=special)
    torch.manual_seed(config.run.seed + distributed.rank())  # for dropout, which differs between ranks
    compiled = config.run.compile != "off"
    if compiled:  # inside checkpointing, which then recomputes with the compiled code
        compile_blocks(objective.student.blocks, ds_config.stage)
        compile_blocks(teacher.image.blocks if teacher is not None else [])
    if ds_config.checkpointing:
        deepspeed.checkpointing.configure(None, deepspeed_config=ds_config.raw())
        checkpoint_blocks(objective.student.blocks, deepspeed.checkpointing.checkpoint)

    cast_statistics(objective, dtype)
    params = ds_config.optimizer_params
    lr = params.get("lr", config.optim.lr)
    groups = parameter_groups(objective, params.get("weight_decay", 0.0), config.optim, lr)
    lr_factor = groups[0].get("lr", lr) / lr  # computed before the optimizer changes the groups
    name_of = {id(parameter): name for name, parameter in objective.named_parameters()}
    names = [[name_of[id(parameter)] for parameter in group["params"]] for group in groups]
    try:
        engine, *_ = deepspeed.initialize(
            model=objective,
            model_parameters=groups,  # type: ignore[arg-type]
            config=ds_config.raw(),
            lr_scheduler=schedule.maker(ds_config, config.optim.warmup_steps(total_steps), total_steps),
        )
    except (AssertionError, ValueError, NotImplementedError) as error:
        raise UserError(f"DeepSpeed refuses the configuration: {error}") from error
    except (ImportError, RuntimeError) as error:
        if not ds_config.compiles or isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(
            f"optimizer.type is {ds_config.optimizer_type!r}: DeepSpeed cannot compile its own here: {error}"
        ) from error
    _undo_first_update(engine.optimizer)
    nonfinite.attach(engine)
    if teacher is not None:
        teacher.to(device=device, dtype=dtype)
    caching = compares_all(config, ds_config)
    if caching and ds_config.stage == 3:
        for parameter in objective.pair_parameters():
            deepspeed.zero.register_external_parameter(objective, parameter)
    return TrainEngine(
        engine, objective, teacher, device, dtype, names, lr_factor, ds_config.accumulation, caching,
        config.optim.cache_on_host, config.optim.reduce_once,
        ema=EMA(engine, config.optim.ema_decay) if config.optim.ema_decay else None,
        compiled=compiled,
    )  # fmt: skip


def _undo_first_update(optimizer: Any) -> None:
    """Undo the update with zero gradients by which DeepSpeed (0.19.8), in 16 bit without ZeRO, creates the states.

    It has decayed the weights, and would count in the bias correction.
    """
    if not hasattr(optimizer, "loss_scale_config"):
        return
    optimizer.refresh_fp32_params()
    for state in [*optimizer.state.values(), *optimizer.param_groups]:
        if "step" in state:
            state["step"] = state["step"] * 0
