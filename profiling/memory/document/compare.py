"""Compares the source document's claims with what is really stored, predicted and measured.

E1, E2, E3 and E5 are about single losses, which are computed in the ways of `implementations.py`.
E4 is about a whole training step (`steps.py`). Each measurement runs in a separate process, at the
setting of the claim: forward alone if memory or time suffice for no more, and with fewer pairs only
if they do not suffice for that.

Shapes: B pairs per rank, P ranks, N image patches, M text positions, H hidden size, D embedding
dimension.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import psutil
import torch

from ds_cmli.cmli.op import why_not_triton
from ds_cmli.memory.report import gigabytes
from profiling.memory.document import implementations
from profiling.memory.document.estimates import Setting, claims
from profiling.memory.document.implementations import Allocations, Implementation
from profiling.memory.document.own_process import tell_from_process

GB = 10**9
MOST_BYTES = 16 * GB  # limit for a measurement in main memory, as others may use the machine too
SPARE_BYTES = 2 * GB  # left for the system and for the process itself
MOST_SECONDS = 180.0  # limit for one measurement
ALL_SECONDS = 900.0  # limit for all measurements together
# What the processes import: with encoders' libraries, which are otherwise imported when the first
# model is built.
PRELOADED = [
    "profiling.memory.document.steps",
    "timm",
    "transformers.models.bert.modeling_bert",
]
FEW_PAIRS = 32  # per rank, at the most, after a measurement that took too long


@dataclass
class Row:
    """One way to compute what one claim is about.

    Sizes are in bytes; None if there is no such figure.
    """

    id: str
    implementation: str
    document_bytes: int | None  # the document's result
    arithmetic_bytes: int | None  # the correct result of the document's formula as written
    corrected_bytes: int | None  # the largest tensor that this implementation stores
    # The largest single allocation of the same code's forward, without data.
    predicted_bytes: int | None = None
    predicted_peak_bytes: int | None = None
    measured_bytes: int | None = None  # the same, as the allocator reports it
    measured_peak_bytes: int | None = None  # above what was live before
    # The device, and the passes that the peak covers; or why it was not measured.
    measured_on: str = ""
    verdict: str = ""
    # Whether the largest allocation that was measured, and the peak, are the predicted ones.
    equal: tuple[bool, bool] | None = None
    less: str = ""  # what was measured in place of the whole: fewer pairs, or forward alone
    extra: dict[str, Any] = field(default_factory=dict)  # of E4, and of fewer pairs

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        del values["equal"], values["less"]
        return {**values, **values.pop("extra")}


def backend(s: Setting, device: str) -> str:
    """The backend that the all-pairs op chooses on `device`."""
    if device == "cuda":
        why_not = why_not_triton(torch.device(device), torch.float16, s.N, s.M, s.D)
        return "triton" if why_not is None else "torch"
    return "auto"


def ways(s: Setting, device: str) -> dict[tuple[str, str], Implementation]:
    """The implementations with the backend that the op chooses on `device`."""
    return implementations.implementations(s, backend(s, device), device)


def predicted_rows(s: Setting, ids: set[str], device: str) -> list[Row]:
    """The rows of the claims in `ids`: predicted, but not measured yet."""
    every, out = claims(s), []
    for (id, name), implementation in ways(s, device).items():
        if id in ids:
            claim, allocations = every[id], implementations.predict(implementation)
            stored = allocations.largest if implementation.op else claim.stored[name]
            row = Row(id, name, claim.document_bytes, claim.arithmetic_bytes, stored)
            row.predicted_bytes, row.predicted_peak_bytes = allocations.largest, allocations.peak
            row.verdict = f"{claim.arithmetic}; {claim.verdict}"
            out.append(row)
    return out


def measure(
    rows: list[Row], s: Setting, device: str, say: Callable[[Row], None] = lambda row: None
) -> None:
    """Measure those of `rows` for which memory and time suffice, and fill in their results."""
    end = time.monotonic() + ALL_SECONDS
    order = ("E1", "E3", "E2", "E5")
    for row in sorted(rows, key=lambda r: (order.index(r.id), r.implementation != "ours")):
        say(row)
        _measure(row, s, device, end)


def _measure(row: Row, s: Setting, device: str, end: float) -> None:
    tried: Setting | None = s
    allocations, why_not = None, ""
    while tried is not None and allocations is None:
        implementation = ways(tried, device)[row.id, row.implementation]
        passes, reason = affordable(implementation, device)
        most = tried.B // 2
        if passes:
            if row.id == "E5":
                passes = "forward"  # this claim is about the size of one tensor
            left = min(MOST_SECONDS, end - time.monotonic())
            if left < 1:
                why_not = why_not or f"the {ALL_SECONDS:.0f} s for measuring were spent"
                break
            allocations = measure_in_subprocess(row, tried, device, passes, left)
            reason, most = f"ended, or took more than {left:.0f} s", min(most, FEW_PAIRS)
        why_not = why_not or reason
        if allocations is None:
            tried = replace(tried, B=most) if most else None
    if allocations is None or tried is None:
        row.measured_on = f"not measured: {why_not}"
        return
    expected, less = implementations.predict(implementation), []
    if allocations.passes != expected.passes:
        expected = implementations.predict(implementation, backward=False)
        less += ["forward alone"] * (row.id != "E5")
    row.measured_on = f"{device_name(device)}, {allocations.passes}"
    row.equal = allocations.largest == expected.largest, allocations.peak == expected.peak
    if tried == s:
        row.measured_bytes, row.measured_peak_bytes = allocations.largest, allocations.peak
        row.predicted_peak_bytes = expected.peak
    else:
        less.insert(0, f"{tried.B} pairs a rank")
        row.measured_on += (
            f", with B={tried.B} ({why_not}): {allocations.largest:,} B, predicted "
            f"{expected.largest:,} B"
        )
        row.extra = {
            "measured_B": tried.B,
            "measured_there_bytes": allocations.largest,
            "predicted_there_bytes": expected.largest,
            "measured_there_peak_bytes": allocations.peak,
            "predicted_there_peak_bytes": expected.peak,
        }
    row.less = ", ".join(less)


def affordable(implementation: Implementation, device: str) -> tuple[str, str]:
    """The passes that fit in memory, "" if none does, and in that case the reason."""
    free = free_bytes(device)
    for passes in ("forward and backward", "forward"):
        need = implementations.predict(implementation, backward=passes != "forward").peak
        if need <= free:
            return passes, ""
    needed, left = gigabytes(need, max(free, 0), digits=1)
    return "", f"needs {needed} GB, {left} GB are free"


def free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] - GB
    free = min([psutil.virtual_memory().available, *control_group_free()])
    return min(MOST_BYTES, free - SPARE_BYTES)


def control_group_free(
    process: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup"
) -> list[int]:
    """Bytes left under each memory limit of a container or a batch job (Linux cgroups v2)."""
    out: list[int] = []
    try:
        path = Path(root) / Path(process).read_text().split("::", 1)[1].strip().lstrip("/")
    except (OSError, IndexError):
        return out
    for folder in (path, *path.parents):
        try:
            most = (folder / "memory.max").read_text()
            used = (folder / "memory.current").read_text()
        except OSError:
            continue
        if most.strip().isdigit():
            out.append(int(most) - int(used))
    return out


def measure_in_subprocess(
    row: Row, s: Setting, device: str, passes: str, seconds: float
) -> Allocations | None:
    """Measure in a separate process, which reports after each pass.

    None if it did not finish forward.
    """
    arguments = (implementations.measured, row.id, row.implementation, device, s, passes)
    allocations = tell_from_process(processes(device), seconds, *arguments)
    return allocations[-1] if allocations else None


def processes(device: str) -> BaseContext:
    """How processes are started: a CPU's are forked from one that has imported everything once."""
    context = get_context("forkserver" if device == "cpu" else "spawn")
    if device == "cpu":
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the server imports with its own path
        context.set_forkserver_preload(PRELOADED)
    return context


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU allocator"
