"""E1, E2, E3 and E5 measured beside their predictions, at the given sizes.

If memory does not suffice for backward, forward alone is measured. On a CPU each of them runs in a
process of its own, with limited time and memory.
"""

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch

from ds_cmli.cmli.op import why_not_triton
from ds_cmli.cmli.sides import power_of_two
from ds_cmli.memory.report import gigabytes
from ds_cmli.memory_model.gpus import Gpu
from profiling.memory.estimates import Claim, Setting, claims, count, in_gigabytes, section
from profiling.memory.implementations import (
    Allocations,
    Implementation,
    implementations,
    predict,
    run,
)

GB = 10**9
MAX_BYTES = 16 * GB  # of main memory, as others may use the machine too
SPARE_BYTES = 2 * GB  # left for the system and for the process itself
MAX_SECONDS = 180.0


@dataclass
class Row:
    """One way to compute what one claim is about; sizes in bytes, None: there is no such figure."""

    id: str
    implementation: str
    document_bytes: int | None  # the document's result
    corrected_bytes: int | None  # the largest tensor that this implementation stores
    predicted_bytes: int | None = None  # the largest single allocation of forward, without data
    predicted_peak_bytes: int | None = None
    measured_bytes: int | None = None
    measured_peak_bytes: int | None = None
    measured_on: str = ""  # the device and the passes that the peaks cover; or why not


def num_rows(setting: Setting, ids: set[str]) -> int:
    return sum(id in ids for id, _ in implementations(setting))


def rows(
    setting: Setting,
    ids: set[str],
    gpu: Gpu | None = None,
    begin: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Predict the claims in `ids`, and measure them where time and memory suffice.

    Args:
        gpu: this machine's; None: on the CPU.
        begin: called with the name of each row before its work begins.
    """
    claim_by_id = claims(setting)
    backend = "auto"
    if gpu is not None:
        # Without data the op cannot try its kernels: try them here, with the op's arguments.
        N, M = map(power_of_two, (setting.N, setting.M))
        why_not = why_not_triton(torch.device("cuda", 0), torch.float32, N, M, setting.D)
        backend = "triton" if why_not is None else "torch"
    out = []
    for (id, name), implementation in implementations(setting, backend).items():
        if id in ids:
            begin(f"{id} {name}")
            out.append(predicted_and_measured(id, name, claim_by_id[id], implementation, gpu))
    return out


def predicted_and_measured(
    id: str, name: str, claim: Claim, implementation: Implementation, gpu: Gpu | None
) -> Row:
    """Predict forward and backward, and measure both, forward alone, or nothing, as memory allows."""
    device = "cpu" if gpu is None else "cuda"
    forward, whole = predict(implementation, gpu)
    available = free_bytes(device)
    corrected_bytes = claim.stored.get(name, whole.largest)
    row = Row(id, name, claim.document_bytes, corrected_bytes, whole.largest, whole.peak)
    if forward.peak > available:
        needed_gb, free_gb = gigabytes(forward.peak, max(available, 0), digits=1)
        row.measured_on = f"not measured: needs {needed_gb} GB, {free_gb} GB are free"
        return row
    # E5 is about the size of one tensor: forward alone shows it.
    attempted = forward if whole.peak > available or id == "E5" else whole
    after_passes: list[Allocations] = []
    if device == "cpu":
        arguments = implementation, device, attempted.passes, attempted.peak + SPARE_BYTES
        after_passes = results_of_process(MAX_SECONDS, measure, *arguments)
    else:
        with suppress(torch.OutOfMemoryError):
            after_passes.extend(measure(implementation, device, attempted.passes))
    if not after_passes:
        row.measured_on = f"not measured: it failed, or took more than {MAX_SECONDS:.0f} s"
        return row
    measured = after_passes[-1]  # of forward alone if backward failed
    row.predicted_peak_bytes = (forward if measured.passes == forward.passes else whole).peak
    row.measured_bytes = measured.largest
    row.measured_peak_bytes = measured.peak
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU allocator"
    row.measured_on = f"{where}, {measured.passes}"
    return row


def measure(
    implementation: Implementation, device: str, passes: str, limit: int | None = None
) -> Iterator[Allocations]:
    """Yield an implementation's allocations after forward, and after backward if `passes` names it.

    Args:
        passes: "forward", or "forward and backward".
        limit: the bytes of main memory that the passes may take.
    """
    # Libraries allocate their workspaces at their first use, which must not count.
    for small in implementations(Setting(2, 1, 4, 4, 8, 8)).values():
        list(run(small, device, backward=True))
    if limit is not None:
        used_bytes = psutil.Process().memory_info().data
        _, hard_limit = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (used_bytes + limit, hard_limit))
    yield from run(implementation, device, passes == "forward and backward")


def free_bytes(device: str) -> int:
    """Return how many bytes a measurement may take."""
    if device == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        return free - GB
    return min(MAX_BYTES, psutil.virtual_memory().available - SPARE_BYTES)


def results_of_process(
    timeout_s: float, generator: Callable[..., Iterator[Any]], *arguments: Any
) -> list[Any]:
    """Return what `generator(*arguments)` yields in a process of its own, within `timeout_s`."""
    context: Any = get_context("spawn" if torch.cuda.is_available() else "forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for the process's imports
    if not torch.cuda.is_available():
        # Imports take seconds: processes are forked from a server that has done them once.
        context.set_forkserver_preload(["profiling.memory.measure"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_send_results, args=(sender, generator, arguments), daemon=True
    )
    process.start()
    sender.close()  # The process has a copy: when it ends, the pipe ends with an EOFError.
    end = time.monotonic() + timeout_s
    items = []
    with suppress(EOFError):
        while receiver.poll(max(0.0, end - time.monotonic())):
            items.append(receiver.recv())
    process.kill()
    process.join()
    return items


def _send_results(sender: Connection, generator: Callable, arguments: tuple) -> None:
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # Libraries print to stdout and stderr.
        os.dup2(devnull, stream)
    for item in generator(*arguments):
        sender.send(item)


def sentences(rows: list[Row]) -> list[str]:
    """Say how many of the measured figures are the predicted ones, and what was not measured."""
    out = []
    measured = [row for row in rows if row.measured_bytes is not None]
    if measured:
        num_equal = sum(row.measured_bytes == row.predicted_bytes for row in measured)
        peaks = [(row.measured_peak_bytes, row.predicted_peak_bytes) for row in measured]
        num_equal_peaks = sum(measured_peak == predicted for measured_peak, predicted in peaks)
        device, _, _ = measured[0].measured_on.partition(",")
        total = len(measured)
        out.append(
            f"Measured by the {device}: {num_equal} of {total} largest allocations and {num_equal_peaks} of "
            f"{total} peaks equal the predicted ones."
        )
    unmeasured = [f"{row.id} {row.implementation}" for row in rows if row.measured_bytes is None]
    if unmeasured:
        out.append(f"Not measured, as the tables say why: {', '.join(unmeasured)}.")
    return out


def tables(rows: list[Row]) -> list[str]:
    """Return tables of what is stored, and of what is held at the peak, in 100 columns each."""
    stored = []
    peaks = []
    for row in rows:
        name = f"{row.id} {row.implementation}"
        sizes = row.document_bytes, row.corrected_bytes, row.predicted_bytes, row.measured_bytes
        stored.append([name, in_gigabytes(row.corrected_bytes), *map(count, sizes)])
        peak = row.predicted_peak_bytes
        peaks.append(
            [name, in_gigabytes(peak), count(peak), count(row.measured_peak_bytes), row.measured_on]
        )
    return [
        section("E1, E2, E3, E5: what is stored",
                ["", "GB", "estimate B", "corrected B", "predicted B", "measured B"], stored,
                "GB: of the corrected figure. corrected, predicted, measured: the largest single allocation of "
                "forward, in bytes"),
        section("E1, E2, E3, E5: at the peak",
                ["", "GB", "predicted B", "measured B", "measured on"], peaks,
                "the most held above what was live before, over the passes named"),
    ]  # fmt: skip
