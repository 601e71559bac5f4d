"""Compares the source document's claims with what is really stored: predicted, and measured if memory and time allow.

E1, E2, E3 and E5 are about single losses, which are computed in the ways of `implementations.py`. E4 is about a whole
training step: it is predicted in the document's setting for each way to compute the loss, and for one preset it is
predicted and measured by category. Each measurement runs in a separate process; what does not fit is only predicted.

As a command, `python -m ds_cmli.memory.compare PRESET WORLD DEVICE` measures a preset's step and prints it as JSON.

Shapes: B pairs per rank, P ranks, N image patches, M text positions, H hidden size, D embedding dimension.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch

from ds_cmli.cmli.baselines import broadcast_scores, materialised_scores
from ds_cmli.cmli.op import triton_runs
from ds_cmli.common import quiet
from ds_cmli.common.errors import UserError
from ds_cmli.common.subprocesses import ask
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.options import DEFAULT_JSON
from ds_cmli.config.presets import load_preset
from ds_cmli.config.schema import Config
from ds_cmli.memory import gpus, implementations, predict_subprocess
from ds_cmli.memory.estimates import Setting, claims, deepspeed_model_states, zero_model_states
from ds_cmli.memory.implementations import Allocations, Implementation
from ds_cmli.memory.predict import DEFAULT_GPU, Prediction, predict

GB = 10**9
MOST_BYTES = 16 * GB  # limit for a measurement in main memory, as others may use the machine too
SPARE_BYTES = 2 * GB  # left for the system and for the process itself
MOST_SECONDS = 120.0  # limit for one measurement
ALL_SECONDS = 180.0  # limit for all measurements together


@dataclass
class Row:
    """One way to compute what one claim is about. Sizes are in bytes; None if there is no such figure."""

    id: str
    implementation: str
    document_bytes: int | None  # the document's result
    arithmetic_bytes: int | None  # the correct result of the document's formula as written
    corrected_bytes: int | None  # the largest tensor that this implementation stores
    predicted_bytes: int | None = None  # the largest single allocation of the same code's forward, without data
    predicted_peak_bytes: int | None = None
    measured_bytes: int | None = None  # the largest single allocation of forward, as the allocator reports it
    measured_peak_bytes: int | None = None  # peak above what was live before
    measured_on: str = ""  # the device, and the passes that the peak covers; or why it was not measured
    verdict: str = ""
    extra: dict[str, Any] = field(default_factory=dict)  # values that only rows of E4 have

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return {**values, **values.pop("extra")}


def backend(device: str) -> str:
    """The backend that the all-pairs op chooses on `device`."""
    return "triton" if device == "cuda" and triton_runs() else "chunked"


def predicted_rows(s: Setting, ids: set[str], device: str) -> list[Row]:
    """The rows of the claims in `ids`: predicted, but not measured yet."""
    every, out = claims(s), []
    for (id, name), implementation in implementations.implementations(s, backend(device)).items():
        if id in ids:
            claim, allocations = every[id], implementations.predict(implementation)
            row = Row(id, name, claim.document_bytes, claim.arithmetic_bytes, claim.stored[name])
            row.predicted_bytes, row.predicted_peak_bytes = allocations.largest, allocations.peak
            row.verdict = f"{claim.arithmetic}; {claim.verdict}"
            out.append(row)
    return out


def measure(rows: list[Row], s: Setting, device: str, say: Callable[[Row], None] = lambda row: None) -> None:
    """Measure those of `rows` for which memory and time suffice, the quick ones first, and fill in their results."""
    end = time.monotonic() + ALL_SECONDS
    known = implementations.implementations(s, backend(device))
    for row in sorted(rows, key=lambda r: (("E1", "E3", "E2", "E5").index(r.id), r.implementation != "ours")):
        say(row)
        passes, why_not = affordable(known[row.id, row.implementation], device)
        if passes and row.id == "E5":
            passes = "forward"  # this claim is about the size of one tensor
        left = min(MOST_SECONDS, end - time.monotonic())
        if passes and left < 1:
            passes, why_not = "", f"the {ALL_SECONDS:.0f} s for measuring were spent"
        allocations = measure_in_subprocess(row, s, device, passes, left) if passes else None
        if allocations is None:
            row.measured_on = f"not measured: {why_not or f'ended, or took more than {left:.0f} s'}"
            continue
        row.measured_bytes, row.measured_peak_bytes = allocations.largest, allocations.peak
        row.measured_on = f"{device_name(device)}, {allocations.passes}"


def affordable(implementation: Implementation, device: str) -> tuple[str, str]:
    """The passes that fit in memory, "" if none does, and in that case the reason."""
    free = free_bytes(device)
    for passes in ("forward and backward", "forward"):
        need = implementations.predict(implementation, backward=passes != "forward").peak
        if need <= free:
            return passes, ""
    return "", f"needs {need / GB:,.1f} GB, {max(free, 0) / GB:,.1f} GB are free"


def free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] - GB
    return min(MOST_BYTES, min([psutil.virtual_memory().available, *control_group_free()]) - SPARE_BYTES)


def control_group_free(process: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> list[int]:
    """Bytes left under each memory limit of a container or a batch job (Linux control groups, version 2), if any."""
    out: list[int] = []
    try:
        path = Path(root) / Path(process).read_text().split("::", 1)[1].strip().lstrip("/")
    except (OSError, IndexError):
        return out
    for folder in (path, *path.parents):
        try:
            most, used = (folder / "memory.max").read_text(), (folder / "memory.current").read_text()
        except OSError:
            continue
        if most.strip().isdigit():
            out.append(int(most) - int(used))
    return out


def measure_in_subprocess(row: Row, s: Setting, device: str, passes: str, seconds: float) -> Allocations | None:
    """Measure in a separate process, which reports after each pass. None if it did not finish forward."""
    module = implementations.__name__
    allocations, _ = ask(["-m", module, row.id, row.implementation, device, json.dumps(asdict(s)), passes], seconds)
    return None if allocations is None else Allocations(**allocations)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU allocator"


ALL_LOSSES = ("global", "cmli", "target_cmli")
# The losses of the step that leaves about 2 GB according to the document, before CMLI is added.
BEFORE = ("global", "cls_kd")


@dataclass(frozen=True)
class Variant:
    """One way to compute the losses of the document's training step."""

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
    """The preset `paper` with the sizes of `s`. Raises `UserError` if its models cannot have these sizes."""
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
    gpu: str = DEFAULT_GPU,
    say: Callable[[Row], None] = lambda row: None,
) -> tuple[list[Row], Prediction | None]:
    """E4: what each variant leaves free on `gpu` (24 GB, assumed); and the prediction of "ours", not checkpointed."""
    claim, total = claims(s)["E4"], gpus.find(gpu).total.bytes
    rows, ours = [], None
    with predicting() as pool:
        for variant in variants:
            name = variant.name + ", checkpointing" * variant.checkpointing
            row = Row("E4", name, claim.document_bytes, None, None, measured_on=f"predicted for {gpu}, rank 0 of {s.P}")
            rows.append(row)
            say(row)
            try:
                config = document_config(s, variant.losses)
            except UserError as error:
                row.verdict = f"not predicted: {error}"
                continue
            prediction = pool.submit(
                predict, config, document_json(variant.checkpointing), s.P, gpu=gpu, scores=variant.scores
            ).result()
            if variant.name == "ours" and not variant.checkpointing:
                ours = prediction
            report = prediction.report
            needed = report.totals["device"]
            row.predicted_bytes, row.predicted_peak_bytes = total - needed, report.totals["requested"]
            row.verdict = f"{'fits' if needed <= total else 'does not fit'}: {describe(total - needed)}"
            row.extra = {"gpu": gpu, "gpu_bytes": total, **report.to_dict()}
    return rows, ours


def describe(free: int) -> str:
    return f"{free / GB:,.1f} GB free" if free >= 0 else f"{-free / GB:,.1f} GB too much"


@contextmanager
def predicting() -> Iterator[ProcessPoolExecutor]:
    """A pool of one process for predictions, which must see no GPU from its start on."""
    with ProcessPoolExecutor(1, get_context("spawn"), _without_gpu, (predict_subprocess.without_gpu(),)) as pool:
        yield pool


def _without_gpu(environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    quiet.silence()


@dataclass
class WholeStep:
    """The memory of one preset's first two steps, by category."""

    preset: str
    world_size: int
    device: str
    prediction: Prediction
    measured: dict[str, Any] | None  # from `Report.to_dict`
    not_measured: str  # why `measured` is None
    parameters: int  # number of trained parameters
    zero: dict[str, int]  # category -> bytes by the formula of the ZeRO paper
    deepspeed_bytes: int | None  # from DeepSpeed's estimator


def whole_step(preset: str, world_size: int, device: str, seconds: float = MOST_SECONDS) -> WholeStep:
    """Predict the step for `device`, and measure it there in a separate process if memory and `seconds` allow."""
    with predicting() as pool:
        ds_config = DeepSpeedConfig.load(DEFAULT_JSON)
        # The measurement uses a fake process group as well, whose collectives copy nothing.
        submitted = pool.submit(predict, load_preset(preset, {}), ds_config, world_size, target=device, backend="fake")
        prediction = submitted.result()
    needed, free = prediction.report.totals["requested"], free_bytes(device)
    measured, why_not = None, f"needs {needed / GB:.1f} GB, {free / GB:.1f} GB are free"
    if needed <= free:
        measured, why_not = ask(["-m", __name__, preset, str(world_size), device], seconds)
    parameters, stage = prediction.parameters, prediction.report.setting["zero_stage"]
    zero = zero_model_states(parameters, world_size, stage)
    estimate = deepspeed_model_states(parameters, prediction.largest_module, world_size, stage)
    return WholeStep(preset, world_size, device, prediction, measured, why_not, parameters, zero, estimate)


def main(preset: str, world_size: str, device: str) -> None:
    from ds_cmli.memory.measure import measure

    report = measure(load_preset(preset, {}), DeepSpeedConfig.load(DEFAULT_JSON), int(world_size), device)
    print(json.dumps(report.to_dict()))


if __name__ == "__main__":
    quiet.silence()
    main(*sys.argv[1:])
