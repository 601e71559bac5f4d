"""E1, E2, E3 and E5 measured beside what is predicted, at the setting itself: in forward alone where
memory suffices for no more; on a CPU each in a process of its own, of limited time and memory.
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
from profiling.memory.estimates import Setting, claims, count, section
from profiling.memory.implementations import (
    Allocations,
    Implementation,
    implementations,
    predict,
    run,
)

GB = 10**9
MOST_BYTES = 16 * GB  # of main memory, as others may use the machine too
SPARE_BYTES = 2 * GB  # left for the system and for the process itself
MOST_SECONDS = 180.0


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


def rows(
    s: Setting, ids: set[str], gpu: Gpu | None = None, doing: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """The claims in `ids`: predicted, and measured where time and memory suffice.

    `gpu`: this machine's; None: on the CPU.
    """
    every, out, device, backend = claims(s), [], "cpu", "auto"
    if gpu is not None:  # without data there is no asking what runs
        device, sides = "cuda", map(power_of_two, (s.N, s.M))  # as the op asks, which does so once
        why_not = why_not_triton(torch.device("cuda", 0), torch.float32, *sides, s.D)
        backend = "triton" if why_not is None else "torch"
    for (id, name), implementation in implementations(s, backend).items():
        if id not in ids:
            continue
        doing(f"{id} {name}")
        forward, whole = predict(implementation, gpu)
        claim, free = every[id], free_bytes(device)
        stored = claim.stored.get(name, whole.largest)
        row = Row(id, name, claim.document_bytes, stored, whole.largest, whole.peak)
        out.append(row)
        if forward.peak > free:
            need = gigabytes(forward.peak, max(free, 0), digits=1)
            row.measured_on = "not measured: needs {} GB, {} GB are free".format(*need)
            continue
        # E5 is about the size of one tensor.
        passes = forward if whole.peak > free or id == "E5" else whole
        after = list[Allocations]()  # each pass
        if device == "cpu":
            arguments = implementation, device, passes.passes, passes.peak + SPARE_BYTES
            after = given_by_process(MOST_SECONDS, measure, *arguments)
        else:
            with suppress(torch.OutOfMemoryError):
                after.extend(measure(implementation, device, passes.passes))
        if not after:
            row.measured_on = f"not measured: it failed, or took more than {MOST_SECONDS:.0f} s"
            continue
        found = after[-1]  # of forward alone where backward did not end
        row.predicted_peak_bytes = (forward if found.passes == forward.passes else whole).peak
        row.measured_bytes, row.measured_peak_bytes = found.largest, found.peak
        where = torch.cuda.get_device_name() if device == "cuda" else "CPU allocator"
        row.measured_on = f"{where}, {found.passes}"
    return out


def measure(
    one: Implementation, device: str, passes: str, most: int | None = None
) -> Iterator[Allocations]:
    """An implementation's allocations after each of `passes`; of a CPU's memory it gets `most` bytes."""
    # Libraries allocate their workspaces at their first use, which must not count.
    for small in implementations(Setting(2, 1, 4, 4, 8, 8)).values():
        list(run(small, device, backward=True))
    if most is not None:
        used = psutil.Process().memory_info().data
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (used + most, hard))
    yield from run(one, device, passes == "forward and backward")


def free_bytes(device: str) -> int:
    """What a measurement may take."""
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0] - GB
    return min(MOST_BYTES, psutil.virtual_memory().available - SPARE_BYTES)


def given_by_process(
    timeout_s: float, generator: Callable[..., Iterator[Any]], *arguments: Any
) -> list[Any]:
    """What `generator(*arguments)` yields in a process of its own, until that ends or is ended."""
    # A CPU's are forked from one that has imported everything once, and finds it as this one does.
    context: Any = get_context("spawn" if torch.cuda.is_available() else "forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    if not torch.cuda.is_available():
        context.set_forkserver_preload(["profiling.memory.measure"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_give, args=(sender, generator, arguments), daemon=True)
    process.start()
    sender.close()  # the process has the other copy, so that its end ends the pipe
    end, given = time.monotonic() + timeout_s, []
    with suppress(EOFError):
        while receiver.poll(max(0.0, end - time.monotonic())):
            given.append(receiver.recv())
    process.kill()
    process.join()
    return given


def _give(sender: Connection, generator: Callable, arguments: tuple) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what libraries print
        os.dup2(nothing, stream)
    for item in generator(*arguments):
        sender.send(item)


def sentences(rows: list[Row]) -> list[str]:
    measured, out = [row for row in rows if row.measured_bytes is not None], []
    if measured:
        largest = sum(row.measured_bytes == row.predicted_bytes for row in measured)
        peaks = sum(row.measured_peak_bytes == row.predicted_peak_bytes for row in measured)
        where, of = measured[0].measured_on.split(",")[0], len(measured)
        out.append(
            f"Measured by the {where}: {largest} of {of} largest allocations and {peaks} of {of} "
            "peaks equal the predicted ones."
        )
    less = [f"{row.id} {row.implementation}" for row in rows if row.measured_bytes is None]
    if less:
        out.append(f"Not measured, as the tables say why: {', '.join(less)}.")
    return out


def tables(rows: list[Row]) -> list[str]:
    """What is stored, and what is held at the peak, in 100 columns each."""
    stored, peaks = [], []
    for row in rows:
        name = f"{row.id} {row.implementation}"
        sizes = row.document_bytes, row.corrected_bytes, row.predicted_bytes, row.measured_bytes
        stored.append([name, *map(count, sizes)])
        peak = count(row.predicted_peak_bytes), count(row.measured_peak_bytes)
        peaks.append([name, *peak, row.measured_on])
    return [
        section("E1, E2, E3, E5: what is stored",
                ["", "document B", "corrected B", "predicted B", "measured B"], stored,
                "corrected, predicted, measured: the largest single allocation of forward"),
        section("E1, E2, E3, E5: at the peak",
                ["", "predicted B", "measured B", "measured on"], peaks,
                "the most held above what was live before, over the passes named"),
    ]  # fmt: skip
