"""Measures the ways to compute the document's losses, each in a process of limited time and memory."""

import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch

from ds_cmli.cmli.op import why_not_triton
from ds_cmli.memory.report import gigabytes
from profiling.memory import implementations
from profiling.memory.estimates import Setting, claims
from profiling.memory.implementations import Allocations, Implementation

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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def ways(s: Setting, device: str) -> dict[tuple[str, str], Implementation]:
    """The implementations with the backend that the op chooses on `device`."""
    backend = "auto"
    if device == "cuda":
        why_not = why_not_triton(torch.device(device), torch.float16, s.N, s.M, s.D)
        backend = "triton" if why_not is None else "torch"
    return implementations.implementations(s, backend)


def rows(
    s: Setting, ids: set[str], device: str, doing: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """The claims in `ids`: predicted, and measured where time and memory suffice."""
    every, out = claims(s), []
    for (id, name), implementation in ways(s, device).items():
        if id not in ids:
            continue
        doing(f"{id} {name}")
        allocations, passes = implementations.predict(implementation), "forward and backward"
        claim, free = every[id], free_bytes(device)
        stored = allocations.largest if implementation.op else claim.stored[name]
        row = Row(id, name, claim.document_bytes, stored, allocations.largest, allocations.peak)
        out.append(row)
        if allocations.peak > free or id == "E5":  # which is about the size of one tensor
            allocations, passes = implementations.predict(implementation, False), "forward"
        if allocations.peak > free:
            need = gigabytes(allocations.peak, max(free, 0), digits=1)
            row.measured_on = "not measured: needs {} GB, {} GB are free".format(*need)
            continue
        arguments = id, name, device, s, passes, allocations.peak + SPARE_BYTES
        told = tell_from_process(MOST_SECONDS, measured, *arguments)
        if not told:
            row.measured_on = f"not measured: it failed, or took more than {MOST_SECONDS:.0f} s"
            continue
        found: Allocations = told[-1]
        if found.passes != allocations.passes:  # backward did not end
            allocations = implementations.predict(implementation, False)
        row.predicted_peak_bytes = allocations.peak
        row.measured_bytes, row.measured_peak_bytes = found.largest, found.peak
        where = torch.cuda.get_device_name() if device == "cuda" else "CPU allocator"
        row.measured_on = f"{where}, {found.passes}"
    return out


def measured(
    id: str, name: str, device: str, s: Setting, passes: str, most: int, say: Callable
) -> None:
    """Measure one implementation alone: `say` gets its allocations after each of `passes`."""
    # Libraries allocate their workspaces at their first use, which must not count.
    for small in ways(implementations.SMALL, device).values():
        implementations.run(small, device, backward=True)
    if device == "cpu":
        used = psutil.Process().memory_info().data
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (used + most, hard))
    one = ways(s, device)[id, name]
    implementations.run(one, device, passes == "forward and backward", say)


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
    with suppress(OSError, IndexError):
        path = Path(root) / Path(process).read_text().split("::", 1)[1].strip().lstrip("/")
        for folder in (path, *path.parents):
            with suppress(OSError, ValueError):  # no limit is "max"
                most = int((folder / "memory.max").read_text())
                out.append(most - int((folder / "memory.current").read_text()))
    return out


def tell_from_process(timeout_s: float, function: Callable, *arguments: Any) -> list[Any]:
    """What `function(*arguments, say)` gives to `say`, in a process that ends after `timeout_s`."""
    # A CPU's are forked from one that has imported everything once, and finds it as this one does.
    context: Any = get_context("spawn" if torch.cuda.is_available() else "forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    if not torch.cuda.is_available():
        context.set_forkserver_preload(["profiling.memory.measure"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()  # the process has the other copy, so that its end ends the pipe
    end, told = time.monotonic() + timeout_s, []
    with suppress(EOFError):
        while receiver.poll(max(0.0, end - time.monotonic())):
            told.append(receiver.recv())
    process.kill()
    process.join()
    return told


def _tell(sender: Connection, function: Callable, arguments: tuple) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what libraries print
        os.dup2(nothing, stream)
    function(*arguments, sender.send)
