"""Compares the document's claim about a whole training step (E4) with the step itself.

It is predicted in the document's setting for each way to compute the loss, and for one preset it is
predicted by category, and measured where there is a GPU.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds_cmli.cmli import distributed
from ds_cmli.cmli.loss import l2_normalize
from ds_cmli.common import quiet
from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.options import DEFAULT_JSON
from ds_cmli.config.presets import load_preset
from ds_cmli.config.schema import Config
from ds_cmli.engine import TrainEngine
from ds_cmli.memory.report import Report, gigabytes
from ds_cmli.memory.step_memory import Step, measured, predicted, predicted_worst
from ds_cmli.memory_model import gpus
from profiling.memory.document.compare import Row, free_bytes, processes
from profiling.memory.document.estimates import Setting, claims, zero_model_states
from profiling.memory.document.implementations import loss_of
from profiling.memory.document.own_process import tell_from_process
from profiling.speed.op import broadcast_scores, materialised_scores

STEP_SECONDS = 600.0  # limit for the measurement of a whole step, for a busy machine too

ALL_LOSSES = ("global", "cmli", "target_cmli")
# The losses of the step that leaves about 2 GB according to the document, before CMLI is added.
BEFORE = ("global", "cls_kd")


@dataclass(frozen=True)
class Variant:
    """One way to compute the losses of the document's training step."""

    name: str
    losses: tuple[str, ...]
    checkpointing: bool
    scores: Callable | None = None  # in place of the op, stored with autograd's graph


VARIANTS = (
    Variant("without CMLI", BEFORE, False),
    Variant("broadcast", ALL_LOSSES, False, broadcast_scores),
    Variant("materialised", ALL_LOSSES, False, materialised_scores),
    Variant("materialised", ALL_LOSSES, True, materialised_scores),
    Variant("ours", ALL_LOSSES, False),
    Variant("ours", ALL_LOSSES, True),
)
# Enough to answer the document; each takes seconds of CPU time.
FIRST_VARIANTS = tuple(
    v for v in VARIANTS if v.scores is not broadcast_scores and not v.checkpointing
)


def stored_loss(
    scores: Callable,
    image: Tensor,
    text: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    ids: Tensor | None,
    learned: Tensor,
) -> Tensor:
    """In place of `CMLILoss.forward`: what `scores` stores of all pairs, autograd keeps."""
    ranks = distributed.world_size()  # whose texts are of this size too
    units = torch.cat([l2_normalize(text)] * ranks)
    s_i2t, s_t2i = scores(l2_normalize(image), units, torch.cat([token_mask] * ranks))
    return loss_of(s_i2t, s_t2i, learned.log())


def document_config(s: Setting, losses: tuple[str, ...] = ALL_LOSSES) -> Config:
    """The preset `paper` with the sizes of `s`.

    Raises `UserError` if its models cannot have these sizes.
    """
    side, patch_size = math.isqrt(s.N), 16
    if side * side != s.N:
        raise UserError(
            f"--N is {s.N}: the models' patches form a square, give {side * side} or {(side + 1) ** 2}"
        )
    if s.H % 64:
        raise UserError(f"--H is {s.H}: the models' heads are 64 wide, give a multiple of 64")
    heads = s.H // 64
    image = {"embed_dim": s.H, "num_heads": heads}
    text = {"hidden_size": s.H, "num_attention_heads": heads, "intermediate_size": 4 * s.H}
    config = load_preset("paper", {"loss": {"weights": dict.fromkeys(losses, 1.0)}})
    sizes: dict[str, Any] = {
        "image_overrides": image,
        "text_overrides": text,
        "text_weights": "random",
    }
    return replace(
        config,
        student=replace(config.student, embed_dim=s.D, **sizes),
        teacher=replace(config.teacher, overrides=image),
        data=replace(config.data, image_size=side * patch_size, context_length=s.M),
        optim=replace(config.optim, micro_batch=s.B),
    )


def document_json(checkpointing: bool) -> DeepSpeedConfig:
    """The DeepSpeed JSON that training uses by default, with fp16 and ZeRO-2."""
    ds_config = DeepSpeedConfig.load(DEFAULT_JSON)
    if not checkpointing:
        ds_config = ds_config.replaced(activation_checkpointing=None)
    return ds_config


def document_rows(
    s: Setting,
    variants: Iterable[Variant] = VARIANTS,
    gpu: str = gpus.DEFAULT,
    say: Callable[[Row], None] = lambda row: None,
) -> tuple[list[Row], Report | None]:
    """E4: what each variant leaves free on `gpu` (24 GB, assumed); and the prediction of "ours"."""
    claim, total = claims(s)["E4"], gpus.find(gpu).total.bytes
    rows, ours = [], None
    for variant in variants:
        name = variant.name + ", checkpointing" * variant.checkpointing
        row = Row("E4", name, claim.document_bytes, None, None)
        row.measured_on = f"predicted for {gpu}"
        rows.append(row)
        say(row)
        try:
            config = document_config(s, variant.losses)
        except UserError as error:
            row.verdict = f"not predicted: {error}"
            continue
        step = Step(config, document_json(variant.checkpointing), s.P, built=partial(_use, variant))
        report = predicted_worst(step, gpus.find(gpu), total)
        if variant.name == "ours" and not variant.checkpointing:
            ours = report
        needed = report.totals["device"]
        row.measured_on += f", rank {report.setting['rank']} of {s.P}, which needs the most"
        row.predicted_bytes = total - needed
        row.predicted_peak_bytes = report.totals["requested"]
        fits = "fits" if needed <= total else "does not fit"
        row.verdict = f"{fits}: {describe(total - needed)}"
        row.extra = {"gpu": gpu, "gpu_bytes": total, **report.to_dict()}
    return rows, ours


def _use(variant: Variant, train_engine: TrainEngine) -> None:
    if variant.scores is not None:
        loss: Any = train_engine.objective.losses["cmli"]
        loss.forward = partial(stored_loss, variant.scores)


def describe(free: int) -> str:
    size, _ = gigabytes(abs(free), 0, digits=1)
    return f"{size} GB {'free' if free >= 0 else 'too much'}"


@dataclass
class WholeStep:
    """The memory of one preset's first two steps, by category."""

    preset: str
    pairs: int  # per rank
    world_size: int
    device: str
    prediction: Report
    measured: dict[str, Any] | None  # from `Report.to_dict`
    not_measured: str  # why `measured` is None
    parameters: int  # number of trained parameters
    zero: dict[str, int]  # category -> bytes by the formula of the ZeRO paper
    deepspeed_bytes: int | None  # from DeepSpeed's estimator


def whole_step(
    preset: str, world_size: int, device: str, gpu: str, seconds: float = STEP_SECONDS
) -> WholeStep:
    """Predict the step for `gpu`, and measure it in a process if it is the GPU of this machine."""
    config = load_preset(preset, {})
    pairs, modules = config.optim.micro_batch, [0]

    def count(train_engine: TrainEngine) -> None:
        for module in train_engine.objective.modules():
            # Under ZeRO-3 `numel` is not the size of the whole parameter.
            own = module.parameters(recurse=False)
            modules.append(sum(getattr(p, "ds_numel", p.numel()) for p in own))

    step = Step(config, DeepSpeedConfig.load(DEFAULT_JSON), world_size)
    report = predicted(replace(step, built=count), gpus.find(gpu))
    taken, why_not = None, "there is no GPU here"
    if device == "cuda":
        need, left = report.totals["requested"], free_bytes(device)
        why_not = "needs {} GB, {} GB are free".format(*gigabytes(need, left, digits=1))
        if need <= left:
            reports = tell_from_process(processes(device), seconds, measured_step, step)
            failed = f"it failed, or took more than {seconds:.0f} s"
            taken, why_not = (reports[-1], "") if reports else (None, failed)
    parameters, stage = sum(modules), report.setting["zero_stage"]
    zero = zero_model_states(parameters, world_size, stage)
    estimate = None
    if stage >= 2:
        estimate = deepspeed_estimate(stage, parameters, max(modules), world_size)
    return WholeStep(
        preset, pairs, world_size, device, report, taken, why_not, parameters, zero, estimate
    )


def deepspeed_estimate(stage: int, trained: int, largest: int, ranks: int) -> int:
    """Bytes on a GPU that DeepSpeed's own functions estimate for stage 2 or 3.

    They count parameters, gradients and optimizer states.
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    if stage == 2:
        return estimate_zero2_model_states_mem_needs(trained, ranks, 1, cpu_offload=False)[1]
    return estimate_zero3_model_states_mem_needs(trained, largest, ranks, 1, False, False)[1]


def measured_step(step: Step, say: Callable[[dict[str, Any]], object]) -> None:
    quiet.silence()
    say(measured(step).to_dict())
