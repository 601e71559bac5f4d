"""python -m ds_cmli.memory.whole_step PRESET WORLD DEVICE: the whole training step, which E4 is about.

Predicted for each way to compute the loss in the document's setting, and for one preset predicted and measured by
category beside DeepSpeed's estimator. As a command: the measurement of a preset, as JSON.

Shapes: B pairs per rank, P ranks, N image patches, M text positions, H hidden size, D matching space.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

from ds_cmli import engine as step
from ds_cmli.common import quiet
from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.options import DEFAULT_JSON
from ds_cmli.config.presets import load_preset
from ds_cmli.config.schema import Config
from ds_cmli.memory import apart, cards
from ds_cmli.memory.compare import GB, MOST_SECONDS, Row, free_bytes
from ds_cmli.memory.estimates import Setting, claims, deepspeed_model_states, zero_model_states
from ds_cmli.memory.implementations import broadcast_scores, materialised_scores
from ds_cmli.memory.predict import DEFAULT_CARD, Prediction, predict

ALL_LOSSES = ("global", "cmli", "target_cmli")
# What the student learned by before, where the document finds 2 GB left.
BEFORE = ("global", "cls_kd")


@dataclass(frozen=True)
class Variant:
    """One way to compute the losses of the document's step."""

    name: str
    losses: tuple[str, ...]
    checkpointing: bool
    scores: Callable | None = None  # in place of `cmli_scores`


VARIANTS = (
    Variant("without CMLI", BEFORE, False),
    Variant("broadcast", ALL_LOSSES, False, broadcast_scores),
    Variant("materialised", ALL_LOSSES, False, materialised_scores),
    Variant("materialised", ALL_LOSSES, True, materialised_scores),
    Variant("ours", ALL_LOSSES, False),
    Variant("ours", ALL_LOSSES, True),
)


def document_config(s: Setting, losses: tuple[str, ...] = ALL_LOSSES) -> Config:
    """The preset `paper` in the setting `s`. Raises `UserError` where its models have no such size."""
    side, patch_size = math.isqrt(s.N), 16
    if side * side != s.N:
        raise UserError(f"--N is {s.N}: the models' patches form a square, give {side * side} or {(side + 1) ** 2}")
    if s.H % 64:
        raise UserError(f"--H is {s.H}: the models' heads are 64 wide, give a multiple of 64")
    heads = s.H // 64
    image = {"embed_dim": s.H, "num_heads": heads}
    text = {"hidden_size": s.H, "num_attention_heads": heads, "intermediate_size": 4 * s.H}
    config = load_preset("paper", {"loss": {"weights": dict.fromkeys(losses, 1.0)}})
    return replace(
        config,
        student=replace(
            config.student, embed_dim=s.D, image_overrides=image, text_overrides=text, text_weights="random"
        ),
        teacher=replace(config.teacher, overrides=image),
        data=replace(config.data, image_size=side * patch_size, text_positions=s.M),
        optim=replace(config.optim, micro_batch=s.B),
    )


def document_json(checkpointing: bool) -> DeepSpeedConfig:
    """The JSON that training takes by default: fp16 and ZeRO-2."""
    ds_config = DeepSpeedConfig.load(DEFAULT_JSON)
    if not checkpointing:
        ds_config = ds_config.replaced(activation_checkpointing=None)
    return ds_config


def document_rows(
    s: Setting,
    variants: Iterable[Variant] = VARIANTS,
    card: str = DEFAULT_CARD,
    say: Callable[[Row], None] = lambda row: None,
) -> tuple[list[Row], Prediction | None]:
    """E4: the bytes that each variant leaves free on a card of 24 GB (assumed); and "ours" without checkpointing."""
    claim, total = claims(s)["E4"], cards.card(card).total.bytes
    rows, ours = [], None
    with predicting() as pool:
        for variant in variants:
            name = variant.name + ", checkpointing" * variant.checkpointing
            row = Row(
                "E4", name, claim.document_bytes, None, None, measured_on=f"predicted for {card}, rank 0 of {s.P}"
            )
            rows.append(row)
            say(row)
            try:
                config = document_config(s, variant.losses)
            except UserError as error:
                row.verdict = f"not predicted: {error}"
                continue
            found = pool.submit(
                predict, config, document_json(variant.checkpointing), s.P, card=card, scores=variant.scores
            ).result()
            if variant.name == "ours" and not variant.checkpointing:
                ours = found
            report = found.report
            needed = report.totals["device"]
            row.predicted_bytes, row.predicted_peak_bytes = total - needed, report.totals["requested"]
            row.verdict = f"{'fits' if needed <= total else 'does not fit'}: {describe(total - needed)}"
            row.extra = {"card": card, "card_bytes": total, **report.to_dict()}
    return rows, ours


def describe(free: int) -> str:
    return f"{free / GB:,.1f} GB free" if free >= 0 else f"{-free / GB:,.1f} GB too much"


@contextmanager
def predicting() -> Iterator[ProcessPoolExecutor]:
    """A process for predictions, which must see no GPU from its start on."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with patch.dict(os.environ, apart.without_gpu()):
            pool.submit(quiet.silence).result()  # it starts at its first task
        yield pool


def predict_preset(preset: str, world_size: int, device: str) -> tuple[Prediction, list[int]]:
    """The prediction, and the number of trained parameters that each part of the student has of its own."""
    build_models = step.build_models
    sizes: list[int] = []

    def build(*arguments: Any) -> Any:
        models = build_models(*arguments)
        sizes.extend(sum(p.numel() for p in module.parameters(recurse=False)) for module in models[0].modules())
        return models

    with patch.object(step, "build_models", build):
        return predict(load_preset(preset, {}), DeepSpeedConfig.load(DEFAULT_JSON), world_size, target=device), sizes


@dataclass
class WholeStep:
    """The second step of one preset, by category."""

    preset: str
    world_size: int
    device: str
    prediction: Prediction
    measured: dict[str, Any] | None  # of `Report.to_dict`
    not_measured: str  # why
    parameters: int  # of the student
    zero: dict[str, int]  # category -> bytes by ZeRO's formula
    deepspeed_bytes: int | None  # by DeepSpeed's estimator


def whole_step(preset: str, world_size: int, device: str, seconds: float = MOST_SECONDS) -> WholeStep:
    """Predicted for `device`, and measured there in a process of its own where memory and `seconds` allow."""
    with predicting() as pool:
        found, sizes = pool.submit(predict_preset, preset, world_size, device).result()
    needed, free = found.report.totals["requested"], free_bytes(device)
    measured, why_not = None, f"needs {needed / GB:.1f} GB, {free / GB:.1f} GB are free"
    if needed <= free:
        measured, why_not = measure_apart(preset, world_size, device, seconds)
    parameters, largest, stage = sum(sizes), max(sizes), found.report.setting["zero_stage"]
    return WholeStep(
        preset,
        world_size,
        device,
        found,
        measured,
        why_not,
        parameters,
        zero_model_states(parameters, world_size, stage),
        deepspeed_model_states(parameters, largest, world_size, stage),
    )


def measure_apart(preset: str, world_size: int, device: str, seconds: float) -> tuple[dict[str, Any] | None, str]:
    command = [sys.executable, "-m", "ds_cmli.memory.whole_step", preset, str(world_size), device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None, f"took more than {seconds:.0f} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return None, f"failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    return json.loads(lines[-1]), ""


def main(preset: str, world_size: str, device: str) -> None:
    from ds_cmli.memory.measure import measure

    report = measure(load_preset(preset, {}), DeepSpeedConfig.load(DEFAULT_JSON), int(world_size), device)
    print(json.dumps(report.to_dict()))


if __name__ == "__main__":
    quiet.silence()
    main(*sys.argv[1:])
