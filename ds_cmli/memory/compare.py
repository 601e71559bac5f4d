"""The document's claims E1, E2, E3 and E5 beside what is predicted and what is measured for each way to compute them.

Each measurement runs in a process of its own, where it fits in memory and in time; what does not stays predicted.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from ds_cmli.cmli.op import triton_runs
from ds_cmli.memory.allocations import Allocations, predict
from ds_cmli.memory.estimates import Setting, claims
from ds_cmli.memory.implementations import Implementation, implementations

GB = 10**9
MOST_BYTES = 16 * GB  # of a measurement in main memory: this is a machine that others use too
SPARE_BYTES = 2 * GB  # left to the system and to the process itself
MOST_SECONDS = 120.0  # of one measurement
ALL_SECONDS = 180.0  # of all together


@dataclass
class Row:
    """One way to compute what one claim is about. Bytes; None where there is no such figure."""

    id: str
    implementation: str
    document_bytes: int | None  # what the document arrives at
    arithmetic_bytes: int | None  # what its formula as written comes to
    corrected_bytes: int | None  # the largest tensor that this implementation stores
    predicted_bytes: int | None = None  # the largest single allocation of forward, of the same code without data
    predicted_peak_bytes: int | None = None
    measured_bytes: int | None = None  # the largest single allocation of forward, as the allocator reports it
    measured_peak_bytes: int | None = None  # the most held above what was live before
    measured_on: str = ""  # and which passes the peak is of; or why it was not measured
    verdict: str = ""
    extra: dict[str, Any] = field(default_factory=dict)  # what only rows of E4 have

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return {**values, **values.pop("extra")}


def backend(device: str) -> str:
    """The one that the all-pairs op chooses for itself."""
    return "triton" if device == "cuda" and triton_runs() else "chunked"


def predicted_rows(s: Setting, ids: set[str], device: str) -> list[Row]:
    """Rows of the claims in `ids`, predicted and not measured yet."""
    every, out = claims(s), []
    for (id, name), implementation in implementations(s, backend(device)).items():
        if id in ids:
            claim, found = every[id], predict(implementation)
            row = Row(id, name, claim.document_bytes, claim.arithmetic_bytes, claim.stored[name])
            row.predicted_bytes, row.predicted_peak_bytes = found.largest, found.peak
            row.verdict = f"{claim.arithmetic}; {claim.verdict}"
            out.append(row)
    return out


def measure(rows: list[Row], s: Setting, device: str, say: Callable[[Row], None] = lambda row: None) -> None:
    """Measure each of `rows` that there is room and time for, the quick ones first."""
    end = time.monotonic() + ALL_SECONDS
    known = implementations(s, backend(device))
    for row in sorted(rows, key=lambda r: (("E1", "E3", "E2", "E5").index(r.id), r.implementation != "ours")):
        say(row)
        passes, why_not = affordable(known[row.id, row.implementation], device)
        if passes and row.id == "E5":
            passes = "forward"  # it is about one tensor's size
        left = min(MOST_SECONDS, end - time.monotonic())
        if passes and left < 1:
            passes, why_not = "", f"the {ALL_SECONDS:.0f} s for measuring were spent"
        found = measure_apart(row, s, device, passes, left) if passes else None
        if found is None:
            row.measured_on = f"not measured: {why_not or f'ended, or took more than {left:.0f} s'}"
            continue
        row.measured_bytes, row.measured_peak_bytes = found.largest, found.peak
        row.measured_on = f"{device_name(device)}, {found.passes}"


def affordable(implementation: Implementation, device: str) -> tuple[str, str]:
    """The passes that fit in memory ("" for none), and what is missing for more."""
    free = free_bytes(device)
    for passes in ("forward and backward", "forward"):
        need = predict(implementation, backward=passes != "forward").peak
        if need <= free:
            return passes, ""
    return "", f"needs {need / GB:,.1f} GB, {max(free, 0) / GB:,.1f} GB are free"


def free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] - GB
    return min(MOST_BYTES, min([psutil.virtual_memory().available, *control_group_free()]) - SPARE_BYTES)


def control_group_free(process: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> list[int]:
    """What the limits of a container or a batch job leave, if there are any (Linux control groups, version 2)."""
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


def measure_apart(row: Row, s: Setting, device: str, passes: str, seconds: float) -> Allocations | None:
    """In a process of its own, which says what it knows after each pass; None where it did not get that far."""
    module = "ds_cmli.memory.allocations"
    command = [sys.executable, "-m", module, row.id, row.implementation, device, json.dumps(asdict(s)), passes]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
    lines = [line for line in said.splitlines() if line.startswith("{")]
    return Allocations(**json.loads(lines[-1])) if lines else None


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU allocator"
