"""The document's claim about a whole training step (E4), and the step of a preset by category.

The document's step is predicted for each way to compute the loss; the preset's is predicted, and
measured where there is a GPU.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from ds_cmli.cmli import distributed
from ds_cmli.cmli.loss import l2_normalize
from ds_cmli.common import quiet
from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.options import DEFAULT_JSON
from ds_cmli.config.presets import load_preset
from ds_cmli.config.schema import Config, Sections
from ds_cmli.engine import TrainEngine
from ds_cmli.memory.report import CATEGORIES, PHASES, Report, gigabytes
from ds_cmli.memory.step_memory import Step, measured, predicted, predicted_worst
from ds_cmli.memory_model.gpus import Gpu
from profiling.memory.estimates import Setting, zero_model_states
from profiling.memory.implementations import loss_of
from profiling.memory.measure import free_bytes, tell_from_process
from profiling.scripts import Table, count
from profiling.speed.op import broadcast_scores, materialised_scores

STEP_SECONDS = 600.0  # limit for the measurement of a whole step, for a busy machine too
ALL_LOSSES = ("global", "cmli", "target_cmli")
BEFORE = ("global", "cls_kd")  # of the step that leaves about 2 GB according to the document


@dataclass(frozen=True)
class Variant:
    """One way to compute the losses of the document's training step."""

    name: str
    losses: tuple[str, ...]
    checkpointing: bool
    scores: Callable | None = None  # in place of the op, stored with autograd's graph


FIRST_VARIANTS = (  # enough to answer the document
    Variant("without CMLI", BEFORE, False),
    Variant("materialised", ALL_LOSSES, False, materialised_scores),
    Variant("ours", ALL_LOSSES, False),
)
VARIANTS = (
    *FIRST_VARIANTS,
    Variant("broadcast", ALL_LOSSES, False, broadcast_scores),
    Variant("materialised, checkpointing", ALL_LOSSES, True, materialised_scores),
    Variant("ours, checkpointing", ALL_LOSSES, True),
)


def stored_loss(
    scores: Callable,
    image: Tensor,
    text: Tensor,
    token_mask: Tensor,
    *_: Any,
    learned: Tensor,
    **__: Any,
):
    """In place of `CMLILoss.forward`: what `scores` stores of all pairs, autograd keeps."""
    ranks = distributed.world_size()  # whose texts are of this size too
    units = l2_normalize(text).repeat(ranks, 1, 1)
    s_i2t, s_t2i = scores(l2_normalize(image), units, token_mask.repeat(ranks, 1))
    return loss_of(s_i2t, s_t2i, learned.log())


def document_config(s: Setting, losses: tuple[str, ...] = ALL_LOSSES) -> Config:
    """The preset `paper` with the sizes of `s`; `UserError` if its models cannot have them."""
    side, heads = math.isqrt(s.N), s.H // 64
    if side * side != s.N:
        squares = f"{side * side} or {(side + 1) ** 2}"
        raise UserError(f"--N is {s.N}: the models' patches form a square, give {squares}")
    if s.H % 64:
        raise UserError(f"--H is {s.H}: the models' heads are 64 wide, give a multiple of 64")
    image = {"embed_dim": s.H, "num_heads": heads}
    text = {"hidden_size": s.H, "num_attention_heads": heads, "intermediate_size": 4 * s.H}
    student = {"embed_dim": s.D, "image_overrides": image, "text_overrides": text}
    overrides: Sections = {
        "student": student | {"text_weights": "random"},
        "teacher": {"overrides": image},
        "data": {"image_size": 16 * side, "context_length": s.M},
        "optim": {"micro_batch": s.B},
        "loss": {"weights": dict.fromkeys(losses, 1.0)},
    }
    return load_preset("paper", overrides)


def document_step(s: Setting, variant: Variant) -> Step:
    """The step in fp16 with ZeRO-2, the DeepSpeed JSON that training uses by default."""
    json = DeepSpeedConfig.load(DEFAULT_JSON)
    if not variant.checkpointing:
        json = json.replaced(activation_checkpointing=None)
    return Step(document_config(s, variant.losses), json, s.P, built=partial(_use, variant))


def _use(variant: Variant, train_engine: TrainEngine) -> None:
    if variant.scores is not None:
        loss: Any = train_engine.objective.losses["cmli"]
        loss.forward = partial(stored_loss, variant.scores)


def predict_document(
    s: Setting, variants: tuple[Variant, ...], gpu: Gpu, doing: Callable[[str], None]
) -> dict[str, Report]:
    """E4: the step of each variant on `gpu`, of the rank that needs the most."""
    reports = {}
    for variant in variants:
        doing(f"E4 {variant.name}")
        step = document_step(s, variant)
        reports[variant.name] = predicted_worst(step, gpu, gpu.total.bytes)
    return reports


def describe(free: int) -> str:
    size, _ = gigabytes(abs(free), 0, digits=1)
    return f"{size} GB {'free' if free >= 0 else 'too much'}"


def document_sentence(reports: dict[str, Report], gpu: Gpu) -> str:
    """The answer to E4."""
    free = {name: gpu.total.bytes - report.totals["device"] for name, report in reports.items()}
    return (
        f"A whole step (E4), predicted for a {gpu.name} (24 GB assumed): all pairs of the batch leave "
        f"{describe(free['ours'])} with ours; with every similarity stored the same step has "
        f"{describe(free['materialised'])}."
    )


def document_table(reports: dict[str, Report], gpu: Gpu) -> Table:
    rows = []
    for name, report in reports.items():
        parts = [report.categories[part] for part in ("activations student", "temporaries")]
        totals = report.totals["requested"], report.totals["device"]
        verdict = describe(gpu.total.bytes - totals[1])
        rows.append([name, *map(count, (*totals, *parts)), verdict])
    columns = ["loss", "peak B", "on the GPU B", "student's activations B", "temporaries B", ""]
    notes = [
        "The document names neither GPU nor models: assumed, as in the preset paper, fp16, ZeRO-2."
    ]
    return Table(f"E4: does the document's step fit a {gpu.name}?", columns, rows, notes)


@dataclass
class WholeStep:
    """The memory of one preset's first two steps, by category."""

    preset: str
    prediction: Report
    measured: dict[str, Any] | None  # from `Report.to_dict`
    not_measured: str  # why `measured` is None
    parameters: int  # number of trained parameters
    largest: int  # parameters of the largest module

    def sentence(self) -> str:
        expected = self.prediction.totals["requested"]
        start = f"A whole step of {self.preset} on a {self.prediction.setting['gpu']}: predicted {expected:,} B"
        if self.measured is None:
            return f"{start}, not measured: {self.not_measured}."
        size = self.measured["totals"]["requested"]
        return f"{start}, measured {size:,} B ({expected / size - 1:+.3%})."

    def table(self) -> Table:
        """Bytes by category and phase: predicted, measured, by ZeRO's formula and DeepSpeed's."""
        report, taken = self.prediction.to_dict(), self.measured
        of = report["setting"]
        zero = zero_model_states(self.parameters, of["world_size"], of["zero_stage"])
        estimate = deepspeed_estimate(
            of["zero_stage"], self.parameters, self.largest, of["world_size"]
        )

        def line(title: str, part: str, name: str, *others: int | None) -> list[str]:
            seen = taken[part].get(name) if taken else None
            cells = [report[part].get(name), seen, *others, None, None][:4]
            return [title, *map(count, cells)]

        rows = [line(name, "categories", name, zero.get(name)) for name in CATEGORIES]
        rows.append(line("peak: the sum", "totals", "requested", sum(zero.values()), estimate))
        rows += [line(f"  in {name}", "phases", name) for name in PHASES]
        columns = ["", "predicted B", "measured B", "ZeRO's formula B", "DeepSpeed's estimator B"]
        notes = [
            f"{self.parameters:,} parameters, {of['world_size']} rank(s). Formula and estimator know "
            "parameters, gradients and optimizer states only."
        ]
        return Table(f"The whole step: preset {self.preset} on a {of['gpu']}", columns, rows, notes)


def whole_step(preset: str, world_size: int, gpu: Gpu, here: bool) -> WholeStep:
    """Predict the step for `gpu`; `here`: it is this machine's, and measures the step too."""
    modules = [0]

    def counted(train_engine: TrainEngine) -> None:
        for module in train_engine.objective.modules():
            # Under ZeRO-3 `numel` is not the size of the whole parameter.
            own = module.parameters(recurse=False)
            modules.append(sum(getattr(p, "ds_numel", p.numel()) for p in own))

    step = Step(load_preset(preset, {}), DeepSpeedConfig.load(DEFAULT_JSON), world_size)
    taken, why_not = None, "there is no GPU here"
    report = predicted(replace(step, built=counted), gpu)
    if here:
        sizes = report.totals["requested"], free_bytes("cuda")
        why_not = "needs {} GB, {} GB are free".format(*gigabytes(*sizes, digits=1))
        if sizes[0] <= sizes[1]:
            told = tell_from_process(STEP_SECONDS, measured_step, step)
            taken, why_not = (told[-1], "") if told else (None, "it failed, or took too long")
    return WholeStep(preset, report, taken, why_not, sum(modules), max(modules))


def measured_step(step: Step, say: Callable[[dict[str, Any]], object]) -> None:
    quiet.silence()
    say(measured(step).to_dict())


def deepspeed_estimate(stage: int, trained: int, largest: int, ranks: int) -> int | None:
    """Bytes on a GPU by DeepSpeed's own functions: parameters, gradients and optimizer states."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    if stage == 3:
        return estimate_zero3_model_states_mem_needs(trained, largest, ranks, 1, False, False)[1]
    if stage == 2:
        return estimate_zero2_model_states_mem_needs(trained, ranks, 1, cpu_offload=False)[1]
    return None
