"""Out of memory: the rank names what it asked for and who holds it, and ends with exit code 2.

Nothing here is a collective. A rank that waits in one for the failed rank is ended by the watchdog,
or by the launcher, which sees the failed rank's exit code.
"""

import errno
import os
import re
import shlex
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import TrainEngine
from ds_cmli.errors import UserError
from ds_cmli.memory.categories import owners
from ds_cmli.memory.profile import record_history
from ds_cmli.memory_model import gpus

PHRASES = ("can't allocate memory", "std::bad_alloc", "out of memory", "ALLOC_FAILED")


def is_shortage(error: BaseException) -> bool:
    """Return True if an exception says that the GPU or this process had too little memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in PHRASES)


@contextmanager
def exit_on_shortage(
    folder: Path, device: torch.device, raises: bool = False
) -> Iterator[list[TrainEngine]]:
    """End the process with a message if memory runs out while the engine is built or trains.

    Yields a list for the engine, once there is one: its tensors are counted in the message.

    Args:
        folder: the run's folder; on a GPU the snapshot is written there.
        raises: raise `UserError` with the message instead if the run has a single rank. The caller
            is then a program, so the message quotes no command line.
    """
    snapshot = folder / f"out_of_memory-rank{distributed.rank()}.pickle"
    if device.type == "cuda":
        _save_when_cuda_runs_out(snapshot)
    engines: list[TrainEngine] = []
    try:
        yield engines
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_shortage(error):
            raise
        gpu_options = fit_options(device) if device.type == "cuda" else ""
        sizes = held_bytes(engines, device)
        # The traceback's frames hold the step's tensors, and printing takes memory.
        traceback.clear_frames(error.__traceback__)
        run_options = "" if raises else shlex.join(sys.argv[1:])
        text = message(error, sizes, gpu_options, run_options)
        if snapshot.exists():
            text += f"\n  snapshot for pytorch.org/memory_viz: {snapshot}"
        if raises and distributed.world_size() == 1:
            raise UserError(text) from None
        print(f"error: {text}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # Not sys.exit: ending the process group would wait for collectives that never finish.
        os._exit(2)  # as for every mistake that the user can correct


def held_bytes(engines: list[TrainEngine], device: torch.device) -> dict[str, int]:
    """Return the bytes by category: what the engine holds on the device, and on a GPU all else."""
    sizes = Counter[str]()
    seen = set[int]()  # storages, which several tensors can share
    for engine in engines:
        for category, tensors in owners(engine):
            for tensor in tree_leaves(tensors):
                if isinstance(tensor, Tensor) and tensor.device.type == device.type:
                    storage = tensor.untyped_storage()
                    if storage._cdata not in seen:
                        seen.add(storage._cdata)
                        sizes[category] += storage.nbytes()
    if device.type == "cuda":
        unowned = torch.cuda.memory_allocated(device) - sizes.total()
        sizes["activations and all else"] = max(unowned, 0)
    return dict(sizes)


def fit_options(device: torch.device) -> str:
    """Return the options by which ds-cmli-memory searches what fits this GPU."""
    try:
        return f"--fit {shlex.quote(gpus.find(torch.cuda.get_device_name(device)).name)}"
    except UserError:
        size = f"{torch.cuda.mem_get_info(device)[1] // 10**6}MB"
        major, minor = torch.cuda.get_device_capability(device)
        return f"--fit {size} --gpu-memory {size} --sm {major}.{minor}"


def message(error: BaseException, sizes: dict[str, int], gpu_options: str, run_options: str) -> str:
    """Name the failed request, the categories that hold memory, largest first, and a command.

    Args:
        gpu_options: the GPU, for the command that finds what fits; "": there is no command.
        run_options: the options of train.py, for the same command.
    """
    lines = [f"out of memory: rank {distributed.rank()}"]
    request = re.search(r"tried to allocate ([\d.]+ [a-z]+)", str(error), re.IGNORECASE)
    requested_bytes = gpus.parse_bytes(request[1]) if request else None
    if requested_bytes is not None:
        lines[0] += f" asked for {requested_bytes:,} B"
    for category, num_bytes in sorted(sizes.items(), key=lambda item: -item[1]):
        if num_bytes:
            lines.append(f"{category:<24} {num_bytes:>16,} B")
    if gpu_options:
        command = ["ds-cmli-memory", run_options]
        command += [f"--world-size {distributed.world_size()}", gpu_options]
        lines.append(f"what fits: {' '.join(filter(None, command))}")
    return "\n  ".join(lines)


def _save_when_cuda_runs_out(path: Path) -> None:
    """Record the allocator's history, and let a failed allocation save it with the state."""
    record_history()

    def save(device: int, size: int, total: int, free: int) -> None:
        torch.cuda.memory._dump_snapshot(str(path))

    torch._C._cuda_attach_out_of_memory_observer(save)  # type: ignore[attr-defined]
