"""A figure beside its bar, and how a test of this folder records and judges its figures.

Recorded figures become the tables of `profiling/gpu_check.py`.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

PROPERTY = "figure"  # the name under which pytest keeps a figure in a test's report

# Relative errors of the predicted peaks. Reserved memory depends on how segments fragment as well.
PREDICTION_BARS = {"requested": 0.05, "allocated": 0.05, "reserved": 0.10}
RESERVED_BAR = 0.01  # of the allocator's model on the recorded requests
SCORES_BAR = 1e-5
GRADIENT_BARS = {"fp64": 1e-10, "fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}  # relative to the largest gradient
SPEED_BAR = 1.0  # of the materialised form's time, forward and backward, at the most


@dataclass(frozen=True)
class Figure:
    name: str
    value: float
    bar: float | None = None  # the largest magnitude that passes; None: the figure is only reported
    note: str = ""

    @property
    def passed(self) -> bool | None:
        # NaN meets no bar.
        return None if self.bar is None else abs(self.value) <= self.bar

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def judge(figures: Iterable[Figure], record_property: Callable[[str, object], None], kernels: bool = False) -> None:
    """Record every figure for the tables, then fail if one misses its bar.

    Args:
        kernels: a GPU's kernels compute these figures, which on a null GPU have no bar.
    """
    figures = list(figures)
    if kernels and "NULLGPU" in os.environ:
        figures = [Figure(figure.name, figure.value, None, "not real on a null GPU") for figure in figures]
    for figure in figures:
        record_property(PROPERTY, figure.to_dict())
    missed = [f"{f.name} is {f.value:.4g}, its bar {f.bar:.4g} ({f.note})" for f in figures if f.passed is False]
    assert not missed, "; ".join(missed)


def prediction_figures(result: dict[str, Any]) -> list[Figure]:
    """Predicted beside measured peaks, and the allocator's model on the recorded requests where there are any."""
    predicted, measured = result["predicted"]["totals"], result["measured"]["totals"]
    out = []
    for name in ("requested", "allocated", "reserved", "device"):
        if name in predicted and measured.get(name):
            note = f"{predicted[name]:,} B predicted, {measured[name]:,} B measured"
            error = predicted[name] / measured[name] - 1
            # "device" rests on the constants of the GPU, which are assumed until they are measured: it has no bar.
            out.append(Figure(f"{name}, predicted/measured - 1", error, PREDICTION_BARS.get(name), note))
    if "allocator" in result:
        model = result["allocator"]
        note = (
            f"{model['at_recorded_address']:,} of {model['allocations']:,} allocations at the recorded address, "
            f"{model['unknown']} unknown"
        )
        out.append(Figure("allocator's model, reserved on the recorded requests", model["error"], RESERVED_BAR, note))
    return out


def exactness_figures(result: dict[str, float], dtype: str) -> list[Figure]:
    return [
        Figure("scores, largest error", result["scores"], SCORES_BAR),
        Figure("gradients, largest error / largest", result["gradients"], GRADIENT_BARS[dtype]),
        Figure("repeats that differ in a bit", result["unequal_repeats"], 0),
    ]


def speed_figures(result: dict[str, float]) -> list[Figure]:
    """Milliseconds of each backend beside those of "materialised"; the first backend alone has a bar."""
    plain = result["materialised"]
    backends = [name for name in result if name != "materialised"]
    return [
        Figure(f"{name}, time / materialised", result[name] / plain, None if i else SPEED_BAR,
               f"{result[name]:.2f} ms, materialised {plain:.2f} ms")
        for i, name in enumerate(backends)
    ]  # fmt: skip


def estimate_figures(rows: list[dict[str, Any]]) -> list[Figure]:
    """Every measured largest allocation equals the prediction; at least E1, E2 and E3 were measured."""
    measured = [row for row in rows if row.get("measured_bytes") is not None]
    out = [
        Figure(f"{row['id']} {row['implementation']}, measured - predicted bytes",
               row["measured_bytes"] - row["predicted_bytes"], 0,
               f"{row['measured_bytes']:,} B on {row['measured_on']}")
        for row in measured if row.get("predicted_bytes") is not None
    ]  # fmt: skip
    missing = {"E1", "E2", "E3"} - {row["id"] for row in measured}
    return [*out, Figure("of E1, E2, E3 not measured", len(missing), 0, ", ".join(sorted(missing)))]
