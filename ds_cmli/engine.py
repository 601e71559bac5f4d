"""Builds student, teacher, losses and DeepSpeed engine from a configuration, and runs one step.

The one place where a training step is put together: whatever trains, profiles or predicts uses it.
"""

import math
import os
from dataclasses import dataclass, replace
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from ds_cmli.cmli.op import why_no_triton
from ds_cmli.common import quiet
from ds_cmli.common.cli import say
from ds_cmli.common.errors import UserError
from ds_cmli.config import deepspeed_checks, schedule
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import Config
from ds_cmli.data import Batch, GlobalBatchSampler, assets
from ds_cmli.distributed import process_group as distributed
from ds_cmli.faults import nonfinite
from ds_cmli.losses import LOSSES, needs_teacher
from ds_cmli.losses.objective import Objective
from ds_cmli.models.student import Student, checkpoint_blocks
from ds_cmli.models.teacher import Teacher

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def on_this_device(ds_config: DeepSpeedConfig) -> DeepSpeedConfig:
    """The JSON as DeepSpeed and this device can run it: its precision is decided."""
    from deepspeed.accelerator import get_accelerator

    deepspeed_checks.deep(ds_config)
    accelerator = get_accelerator()
    device = accelerator.device_name()
    # CPUs that have fp16 at all run this step two to three times slower in it than in bf16; GPUs before Ampere
    # imitate bf16 slowly.
    fp16 = device != "cpu" and accelerator.is_fp16_supported()
    if device == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        bf16 = accelerator.is_bf16_supported()
    return ds_config.on(device, fp16, bf16)


def filled(config: Config, ds_config: DeepSpeedConfig, world_size: int, total_steps: int) -> DeepSpeedConfig:
    """The JSON with nothing left to "auto"."""

    def width() -> int:
        with torch.device("meta"):
            vit: Any = timm.create_model(config.student.image_model, **config.student.image_overrides)
            return vit.embed_dim

    return ds_config.filled(config.optim, world_size, total_steps, width)


def try_out(ds_config: DeepSpeedConfig, total_steps: int) -> str | None:
    """`schedule.try_out` where the optimizer will run."""
    from deepspeed.accelerator import get_accelerator

    gpu_only = ds_config.optimizer_params.get("fused") or ds_config.optimizer_params.get("capturable")
    device = get_accelerator().device_name() if gpu_only and ds_config.offload("optimizer") == "none" else "cpu"
    return schedule.try_out(ds_config, torch.device(device), total_steps)


def with_backend(config: Config, device: torch.device) -> tuple[Config, str | None]:
    """The configuration with the all-pairs backend that will run, and the line for where that is the slower one.

    Raises:
        UserError: the backend that is asked for does not run.
    """
    asked = config.loss.cmli_backend
    if asked == "chunked" or not any("cmli_backend" in LOSSES[name].settings for name in config.loss.weights):
        return config, None
    reason = why_no_triton() if device.type == "cuda" else "there is no GPU"
    if asked == "triton" and reason is not None:
        raise UserError(f"loss.cmli_backend is 'triton', which does not run here ({reason}): give 'auto' or 'chunked'")
    notice = None
    if reason is not None and device.type == "cuda":
        notice = f"Triton does not run here, the all-pairs losses take the slower chunked backend: {reason}"
    backend: Literal["chunked", "triton"] = "triton" if reason is None else "chunked"
    return replace(config, loss=replace(config.loss, cmli_backend=backend)), notice


def plan(config: Config, ds_config: DeepSpeedConfig, length: int) -> tuple[DeepSpeedConfig, GlobalBatchSampler, int]:
    """The DeepSpeed JSON with nothing left to "auto", the sampler of `length` samples, and the optimizer steps.

    Says how the batch is made up. Raises `UserError` where it cannot be.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    total, micro_batch, accumulation = ds_config.batch(config.optim.micro_batch, ranks)
    sampler = GlobalBatchSampler(length, micro_batch, rank, ranks, config.run.seed)
    steps = config.optim.steps
    if steps is None:
        assert config.optim.epochs is not None
        steps = max(1, int(config.optim.epochs * sampler.batches_per_epoch / accumulation))
    say(
        f"batch: {micro_batch} pairs per rank x {accumulation} accumulation x {ranks} ranks = {total} pairs a step; "
        f"{steps} steps; negatives from {micro_batch * ranks} pairs"
    )
    ds_config = filled(config, ds_config, ranks, steps)
    for notice in (*ds_config.notices, try_out(ds_config, steps)):
        say(notice)
    return ds_config, sampler, steps


def resolve_weights(config: Config) -> Config:
    """The configuration with "demo" weights replaced by the paths of the packaged ones."""
    student, teacher = config.student, config.teacher
    if student.image_weights == "demo":
        student = replace(student, image_weights=str(assets.vit_weights()))
    if student.text_weights == "demo":
        student = replace(student, text_weights=str(assets.minilm()))
    if teacher.weights == "demo":
        teacher = replace(teacher, weights=str(assets.vit_weights()))
    return replace(config, student=student, teacher=teacher)


def build_models(config: Config, vocab_size: int, pretrained: bool = True) -> tuple[Objective, Teacher | None]:
    """Student with losses, and the teacher where a loss asks for it; on the CPU, in fp32, equal on every rank.

    `pretrained=False`: the student's weights are random, as they will be overwritten.
    """
    config = resolve_weights(config)
    torch.manual_seed(config.run.seed)
    data = config.data
    student = Student(config.student, data.image_size, vocab_size, data.context_length, pretrained)
    teacher = None
    if needs_teacher(config.loss.weights):
        teacher = Teacher(config.teacher, data.image_size, student.grid)
    return Objective(student, config.loss, teacher.width if teacher else None), teacher


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only: not on norms, biases, temperatures, class tokens and embeddings."""
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    named = ("cls_token", "pos_embed", "reg_token", "mask_token")
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        flat = parameter.ndim < 2 or id(parameter) in embeddings or name.rsplit(".", 1)[-1] in named
        (plain if flat else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def use_no_compiler() -> None:
    """On a CPU, keep DeepSpeed from building its shared-memory collectives: minutes of compiling at the first start."""
    import deepspeed.ops

    if not torch.cuda.is_available():
        # The whole table, as DeepSpeed fills it by running compilers.
        deepspeed.ops.__compatible_ops__ = {}


@dataclass
class TrainEngine:
    engine: Any  # deepspeed.DeepSpeedEngine around the objective
    objective: Objective
    teacher: Teacher | None
    device: torch.device
    dtype: torch.dtype
    names: list[list[str]]  # of the parameters, in the order of the optimizer's groups
    lr: float = 0.0  # that the last update was made with

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward, backward and, at the end of accumulation, update on one micro-batch of this rank.

        Returns the weighted loss and each loss by name, of this rank's pairs, fp32 scalars without graph.
        """
        batch = batch.to(self.device)
        targets = self.teacher(batch.image) if self.teacher is not None else None
        total, each = self.engine(batch, targets)  # collectives: text features, column statistics
        total = nonfinite.poison(total)
        self.engine.backward(total * self.missing_scale)  # collectives: text gradients, gradient buckets
        self.lr = self.engine.get_lr()[0]  # of this update: its end brings the next one's
        self.engine.step()  # collectives and a CPU-GPU sync: overflow check, gradient norm, updated weights
        return total.detach(), each

    @property
    def missing_scale(self) -> float:
        """The loss scale where DeepSpeed (0.19.8) forgets it: in 16 bit without ZeRO it only divides by it."""
        config = getattr(self.engine.optimizer, "loss_scale_config", None)
        return 1.0 if config is None else config.cur_scale

    @property
    def skipped(self) -> bool:
        """Whether the update that ended the last accumulation was left out, on all ranks: something was not finite."""
        return not self.engine.was_step_applied()

    def state(self) -> dict[str, float]:
        """Last update's rate, gradient norm, loss scale and temperatures. CPU-GPU sync; collective under ZeRO-3."""
        optimizer = self.engine.optimizer
        out = {"lr": self.lr}
        norm = self.engine.get_global_grad_norm()
        if norm is not None:
            out["grad_norm"] = float(norm) / self.missing_scale
        if self.dtype == torch.float16:
            out["loss_scale"] = float(optimizer.loss_scale)
            out["skipped_steps"] = self.engine.skipped_steps
        for name, scale in self.objective.scales().items():
            out[f"temperature/{name}"] = 1 / scale if scale else math.inf  # a scale learned down to 0
        return out


def build(
    config: Config, ds_config: DeepSpeedConfig, vocab_size: int, total_steps: int, device: torch.device
) -> TrainEngine:
    """The engine around student and losses, ready to step.

    Args:
        ds_config: after `on_this_device` and `filled`.
        vocab_size: of the tokenizer.
        total_steps: optimizer steps of the whole run, for the schedule.
        device: this rank's; the process group is already up.
    """
    import deepspeed

    use_no_compiler()
    if ds_config.prints:
        quiet.let_deepspeed_print(ds_config.get("log_level") is None)
    deepspeed.init_distributed(verbose=False)
    dtype = DTYPES[ds_config.precision]
    objective, teacher = build_models(config, vocab_size)
    torch.manual_seed(config.run.seed + distributed.rank())  # dropout: its own on each rank
    if ds_config.checkpointing:
        deepspeed.checkpointing.configure(None, deepspeed_config=ds_config.raw())
        checkpoint_blocks(objective.student.blocks, deepspeed.checkpointing.checkpoint)

    weight_decay = ds_config.optimizer_params.get("weight_decay", 0.0)
    groups = parameter_groups(objective, weight_decay)
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
    return TrainEngine(engine, objective, teacher, device, dtype, names)


def _undo_first_update(optimizer: Any) -> None:
    """Take back the update with zero gradients by which DeepSpeed (0.19.8), in 16 bit without ZeRO, makes the states.

    It has decayed the weights, and counts in the bias correction.
    """
    if not hasattr(optimizer, "loss_scale_config"):
        return
    optimizer.refresh_fp32_params()
    for state in [*optimizer.state.values(), *optimizer.param_groups]:
        if "step" in state:
            state["step"] = state["step"] * 0
