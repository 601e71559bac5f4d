"""The document's claim about a whole training step (E4), predicted for each way to compute the loss; and
the step of a preset by category, predicted, and measured where there is a GPU.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from ds_cmli.cmli.exchange import num_ranks
from ds_cmli.cmli.normalize import l2_normalize
from ds_cmli.commands import noun
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.options import DEFAULT_JSON
from ds_cmli.config.presets import load_preset
from ds_cmli.config.schema import Config, Sections
from ds_cmli.engine import TrainEngine
from ds_cmli.errors import UserError
from ds_cmli.libraries import silence
from ds_cmli.memory.report import Report, gigabytes
from ds_cmli.memory.step_memory import Step, measured, predicted, predicted_worst
from ds_cmli.memory_model.gpus import Gpu
from profiling.memory.estimates import Setting, count, in_gigabytes, section
from profiling.memory.implementations import broadcast_scores, contrastive_loss
from profiling.memory.measure import results_of_process
from profiling.speed.op import materialised_scores

STEP_SECONDS = 600.0  # limit for the measurement of a whole step, for a busy machine too
ALL_LOSSES = ("global", "cmli", "target_cmli")
# The losses of the step that leaves about 2 GB according to the document.
LOSSES_WITHOUT_CMLI = ("global", "cls_kd")


@dataclass(frozen=True)
class Variant:
    """One way to compute the losses of the document's training step."""

    name: str
    losses: tuple[str, ...]
    checkpointing: bool
    scores: Callable | None = None  # in place of the op, stored with autograd's graph

    def replace_loss(self, train_engine: TrainEngine) -> None:
        if self.scores is not None:
            loss: Any = train_engine.objective.losses["cmli"]
            loss.forward = partial(stored_loss, self.scores)


NUM_ANSWERING = 3  # variants that answer the document; they come first
VARIANTS = (
    Variant("without CMLI", LOSSES_WITHOUT_CMLI, False),
    Variant("materialised", ALL_LOSSES, False, materialised_scores),
    Variant("ours", ALL_LOSSES, False),
    Variant("broadcast", ALL_LOSSES, False, broadcast_scores),
    Variant("materialised, checkpointing", ALL_LOSSES, True, materialised_scores),
    Variant("ours, checkpointing", ALL_LOSSES, True),
)


def stored_loss(
    scores: Callable,
    image: Tensor,
    text: Tensor,
    token_mask: Tensor,
    *_,
    scale_and_bias: Tensor,
    **__,
) -> Tensor:
    """Replace `CMLILoss.forward`: what `scores` stores of all pairs, autograd keeps."""
    ranks = num_ranks()  # whose texts are of this size too
    texts = l2_normalize(text).repeat(ranks, 1, 1)
    masks = token_mask.repeat(ranks, 1)
    return contrastive_loss(scores, l2_normalize(image), texts, masks, scale_and_bias.log())


def document_config(s: Setting, losses: tuple[str, ...] = ALL_LOSSES) -> Config:
    """Return the preset `paper` with the sizes of `s`; `UserError` if its models cannot have them."""
    side = math.isqrt(s.N)
    heads = s.H // 64
    if side * side != s.N:
        give = f"{side * side} or {(side + 1) ** 2}"
        raise UserError(f"--N is {s.N}: the models' patches form a square, give {give}")
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


def predict_document(
    s: Setting, variants: tuple[Variant, ...], gpu: Gpu, begin: Callable[[str], None]
) -> dict[str, Report]:
    """Predict E4, the step of each variant on `gpu`, for the rank that needs the most.

    It is in fp16 with ZeRO-2, the DeepSpeed JSON that training uses by default. `begin` is called with the
    name of each variant before its work begins.
    """
    reports = {}
    for variant in variants:
        begin(f"E4 {variant.name}")
        json = DeepSpeedConfig.load(DEFAULT_JSON)
        if not variant.checkpointing:
            json = DeepSpeedConfig.of({**json, "activation_checkpointing": None})
        step = Step(document_config(s, variant.losses), json, s.P, prepare=variant.replace_loss)
        reports[variant.name] = predicted_worst(step, gpu, gpu.total_bytes)
    return reports


def verdict(report: Report, gpu: Gpu) -> str:
    free = gpu.total_bytes - report.totals["device"]
    (difference,) = gigabytes(abs(free), digits=1)
    return f"{difference} GB {'free' if free >= 0 else 'too much'}"


def document_sentence(reports: dict[str, Report], gpu: Gpu) -> str:
    """Answer E4."""
    return (
        f"A whole step (E4), predicted for a {gpu.name} (the draft says 24 GB and names no GPU; this one has "
        f"{gigabytes(gpu.total_bytes)[0]} GB): all pairs of the batch leave "
        f"{verdict(reports['ours'], gpu)} with ours; with every similarity stored the same step has "
        f"{verdict(reports['materialised'], gpu)}."
    )


def document_table(reports: dict[str, Report], gpu: Gpu) -> str:
    rows = []
    for name, report in reports.items():
        sizes = [report.totals["requested"], report.totals["device"]]
        sizes += [report.categories[part] for part in ("activations student", "temporaries")]
        rows.append([name, *gigabytes(*sizes), verdict(report, gpu)])
    columns = ["loss", "peak GB", "on the GPU GB", "activations GB", "temporaries GB", ""]
    note = "The document names neither GPU nor models: assumed, the preset paper, fp16, ZeRO-2"
    return section(f"E4: does the document's step fit a {gpu.name}?", columns, rows, note)


def whole_step(preset: str, world_size: int, gpu: Gpu, measures: bool) -> tuple[str, str]:
    """Return a sentence about a preset's first two steps, and a table of bytes by category and phase.

    They are predicted for `gpu`, and measured too if it is this machine's (`measures`).
    """
    step = Step(load_preset(preset, {}), DeepSpeedConfig.load(DEFAULT_JSON), world_size)
    report = predicted(step, gpu)
    requested = report.totals["requested"]
    measurement: Report | None = None
    result = "not measured: there is no GPU here"
    if measures:
        (measurement,) = results_of_process(STEP_SECONDS, measured_alone, step) or [None]
        result = "not measured: it does not fit, or took too long"
    if measurement is not None:
        size = measurement.totals["requested"]
        result = f"measured {size:,} B ({requested / size - 1:+.3%})"
    lines = [(name, "categories", name) for name in report.categories]
    lines.append(("peak: the sum", "totals", "requested"))
    lines += [(f"in {name}", "phases", name) for name in report.phases]
    rows = []
    for line, part, name in lines:
        size = vars(report)[part][name]
        counted = None if measurement is None else vars(measurement)[part].get(name)
        rows.append([line, in_gigabytes(size), count(size), count(counted)])
    ranks = noun(world_size, "rank")
    title = f"The whole step: preset {preset} on the {gpu.name}, {world_size} {ranks}"
    table = section(title, ["", "GB", "predicted B", "measured B"], rows)
    sentence = f"{title}: predicted {requested:,} B ({in_gigabytes(requested)} GB), {result}."
    return sentence, table


def measured_alone(step: Step) -> Iterator[Report]:
    silence()
    yield replace(measured(step), events=())
