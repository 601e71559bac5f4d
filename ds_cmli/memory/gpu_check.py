"""The checks that need a GPU: each in a process of its own, the bars they must meet, and the tables of what was found.

`profiling/gpu_check.py` runs them. Predictions are made beside the measurements, on the CPU.
"""

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ds_cmli.memory.gpu_settings import SETTINGS, Setting

# Relative errors of the predicted peaks. Reserved memory depends on how segments fragment as well.
PREDICTION_BARS = {"requested": 0.05, "allocated": 0.05, "reserved": 0.10}
RESERVED_BAR = 0.01  # of the allocator's model on the recorded requests
SCORES_BAR = 1e-5
GRADIENT_BARS = {"fp64": 1e-10, "fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}  # relative to the largest gradient
SPEED_BAR = 1.0  # of the materialised form's time, forward and backward, at the most


@dataclass(frozen=True)
class Check:
    name: str
    kind: str  # prediction, exactness, speed or estimates
    task: dict[str, Any]  # as `gpu_task` takes it
    limit_s: int
    alone: bool = False  # nothing else may run on the machine


@dataclass
class Row:
    """One figure beside its bar. `passed` is None where it could not be had, or has no bar."""

    check: str
    figure: str
    value: float | None
    bar: float | None
    passed: bool | None
    note: str = ""


@dataclass
class Outcome:
    check: Check
    found: dict[str, Any] = field(default_factory=dict)
    failed: str = ""  # in words; "" where the check ran to its end
    seconds: float = 0.0


def checks(backend: str = "triton", settings: Iterable[Setting] = SETTINGS) -> list[Check]:
    out = [Check(s.name, "prediction", {"setting": s.to_dict()}, 120) for s in settings]
    for dtype in GRADIENT_BARS:
        out.append(Check(f"all-pairs op, {dtype}", "exactness", {"dtype": dtype, "backend": backend}, 150))
    backends = list(dict.fromkeys([backend, "chunked"]))
    for dtype in ("bf16", "fp32"):
        out.append(Check(f"speed, {dtype}", "speed", {"dtype": dtype, "backends": backends}, 120, alone=True))
    out.append(Check("E1 to E5", "estimates", {}, 240, alone=True))
    return out


def run(todo: list[Check], budget_s: float, jobs: int, device: str, report: Callable[[Outcome], None]) -> list[Outcome]:
    """Run every check in a process of its own, `jobs` at a time and the lonely ones after, within `budget_s` in all.

    `report` is called with each outcome as it comes, one at a time. What no time is left for is an outcome too.
    """
    end = time.monotonic() + budget_s
    lock = threading.Lock()

    def one(check: Check) -> Outcome:
        outcome = run_one(check, min(check.limit_s, end - time.monotonic()), device)
        with lock:
            report(outcome)
        return outcome

    with ThreadPoolExecutor(jobs) as pool:
        outcomes = list(pool.map(one, (c for c in todo if not c.alone)))
    return outcomes + [one(c) for c in todo if c.alone]


def run_one(check: Check, limit_s: float, device: str) -> Outcome:
    """`python -m ds_cmli.memory.gpu_task`, which prints its result as the last line."""
    if limit_s < 1:
        return Outcome(check, failed="no time left")
    command = [sys.executable, "-m", "ds_cmli.memory.gpu_task", check.kind, device, json.dumps(check.task)]
    start = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=_environment())
    except subprocess.TimeoutExpired:
        return Outcome(check, failed=f"longer than {limit_s:.0f} s", seconds=limit_s)
    seconds = time.monotonic() - start
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return Outcome(check, failed=f"exit code {done.returncode}: {last[:300]}", seconds=seconds)
    return Outcome(check, json.loads(lines[-1]), seconds=seconds)


def _environment() -> dict[str, str]:
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    allocator = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # its old name and its new one
    return {k: v for k, v in os.environ.items() if k not in (*launchers, *allocator)}


def rows(outcome: Outcome) -> list[Row]:
    """The figures of one check beside their bars. A check that did not run to its end missed them."""
    check, found = outcome.check, outcome.found
    if outcome.failed:
        return [Row(check.name, check.kind, None, None, False, outcome.failed)]
    return {"prediction": _prediction, "exactness": _exactness, "speed": _speed, "estimates": _estimates}[check.kind](
        check, found
    )


def _bar(check: Check, figure: str, value: float, bar: float, note: str = "") -> Row:
    # NaN meets no bar.
    return Row(check.name, figure, value, bar, abs(value) <= bar, note)


def _prediction(check: Check, found: dict[str, Any]) -> list[Row]:
    predicted, measured = found["predicted"]["totals"], found["measured"]["totals"]
    out = []
    for name in ("requested", "allocated", "reserved", "device"):
        if name not in predicted or not measured.get(name):
            continue
        error = predicted[name] / measured[name] - 1
        note = f"{predicted[name]:,} B predicted, {measured[name]:,} B measured"
        if name in PREDICTION_BARS:
            out.append(_bar(check, f"{name}, predicted/measured - 1", error, PREDICTION_BARS[name], note))
        else:  # rests on the card's constants, which are assumed until they are measured
            out.append(Row(check.name, f"{name}, predicted/measured - 1", error, None, None, note))
    if "allocator" in found:
        model = found["allocator"]
        note = (
            f"{model['at_recorded_address']:,} of {model['allocations']:,} allocations at the recorded address, "
            f"{model['unknown']} unknown"
        )
        out.append(
            _bar(check, "allocator's model, reserved on the recorded requests", model["error"], RESERVED_BAR, note)
        )
    return out


def _exactness(check: Check, found: dict[str, Any]) -> list[Row]:
    return [
        _bar(check, "scores, largest error", found["scores"], SCORES_BAR),
        _bar(check, "gradients, largest error / largest", found["gradients"], GRADIENT_BARS[check.task["dtype"]]),
        _bar(check, "repeats that differ in a bit", found["unequal_repeats"], 0),
    ]


def _speed(check: Check, found: dict[str, Any]) -> list[Row]:
    plain = found["materialised"]
    out = []
    for i, name in enumerate(check.task["backends"]):
        note = f"{found[name]:.2f} ms, materialised {plain:.2f} ms"
        ratio = found[name] / plain
        if i == 0:
            out.append(_bar(check, f"{name}, time / materialised", ratio, SPEED_BAR, note))
        else:
            out.append(Row(check.name, f"{name}, time / materialised", ratio, None, None, note))
    return out


def _estimates(check: Check, found: dict[str, Any]) -> list[Row]:
    """Every measured largest allocation equals the prediction; at least E1, E2 and E3 were measured."""
    out = []
    measured = [row for row in found["rows"] if row.get("measured_bytes") is not None]
    for row in measured:
        if row.get("predicted_bytes") is not None:
            name, note = f"{row['id']} {row['implementation']}", f"{row['measured_bytes']:,} B on {row['measured_on']}"
            difference = row["measured_bytes"] - row["predicted_bytes"]
            out.append(_bar(check, f"{name}, measured - predicted bytes", difference, 0, note))
    missing = {"E1", "E2", "E3"} - {row["id"] for row in measured}
    out.append(_bar(check, "of E1, E2, E3 not measured", len(missing), 0, ", ".join(sorted(missing))))
    return out


def failed(found: list[Row]) -> list[Row]:
    return [row for row in found if row.passed is False]


def write(outcomes: list[Outcome], device: str, json_path: Path, markdown_path: Path) -> None:
    """Both files, whole at any moment: written after each check, so that an end by force leaves what was found."""
    found = [row for outcome in outcomes for row in rows(outcome)]
    content = {
        "device": device,
        "passed": not failed(found) and bool(found),
        "rows": [asdict(row) for row in found],
        "checks": [asdict(outcome) for outcome in outcomes],
    }
    _replace(json_path, json.dumps(content, indent=2) + "\n")
    _replace(markdown_path, markdown(outcomes, device))


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".part")
    beside.write_text(text)
    beside.replace(path)


def markdown(outcomes: list[Outcome], device: str) -> str:
    found = [row for outcome in outcomes for row in rows(outcome)]
    missed = failed(found)
    lines = [
        f"# Checked on {device}",
        "",
        f"{len(outcomes)} checks, {len(found)} figures, {len(missed)} missed their bar.",
        "",
        "| check | figure | value | bar | | |",
        "|---|---|---|---|---|---|",
    ]
    for row in [*missed, *(r for r in found if r.passed is not False)]:
        verdict = {True: "met", False: "**missed**", None: "no bar"}[row.passed]
        lines.append(
            f"| {row.check} | {row.figure} | {_number(row.value)} | {_number(row.bar)} | {verdict} | {row.note} |"
        )
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if math.isfinite(value) and value == int(value) else f"{value:.3g}"
