"""Whether a model of so many parameters fits into this machine's memory: asked before it is built.

The system would otherwise end the process without a word, minutes later.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from ds_cmli.common.errors import UserError

CGROUP = Path("/sys/fs/cgroup")  # of this process, as containers and Slurm see it


def check_room(setting: str, value: object, parameters: int) -> None:
    """Raise `UserError` if `parameters` in fp32 are more than the memory that is free here.

    Nothing in a prediction, which is for another machine.

    Args:
        setting, value: what to change.
    """
    if isinstance(torch.empty(0), FakeTensor):
        return
    needed, free = 4 * parameters, min(_free(), default=None)
    if free is not None and needed > free:
        raise UserError(
            f"{setting} is {value!r}: {parameters:,} parameters take {needed:,} B, and {free:,} B are free here: give "
            "a smaller model"
        )


def count(model: nn.Module | None) -> int:
    return sum(parameter.numel() for parameter in model.parameters()) if model is not None else 0


def _free() -> Iterator[int]:
    """Bytes: what the machine and the control group have left."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        if found:
            yield int(found[1]) * 1024
        limit, used = (
            (CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current")
        )
        inactive = re.search(r"inactive_file (\d+)", (CGROUP / "memory.stat").read_text())
        if limit != "max":  # pages of files that are not in use are given up when memory is short
            yield int(limit) - int(used) + (int(inactive[1]) if inactive else 0)
    except (OSError, ValueError):
        return
