"""A checkpoint of P ranks for another number of ranks, by DeepSpeed's universal checkpoint.

ZeRO cuts optimizer and fp32 weights into P parts. The conversion joins them parameter by parameter, from which any
number of ranks takes its parts. It needs about the checkpoint's space once more, until it has been loaded.
"""

import argparse
import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

import torch

from ds_cmli.common.errors import UserError
from ds_cmli.distributed import process_group as distributed

CONVERTED = "universal.writing"  # half-written and left-over ones go with the next checkpoint


def convert(checkpoint: Path) -> Path:
    """Write the universal form of a verified checkpoint and return its folder. Collective; rank 0 works.

    Raises:
        UserError: on every rank, where it cannot be written.
    """
    converted = checkpoint.parent / CONVERTED / checkpoint.name
    error = distributed.broadcast_object(
        _convert(checkpoint, converted) if distributed.is_main() else None
    )  # collective
    if error is not None:
        raise UserError(f"{checkpoint}: cannot be converted to {distributed.world_size()} ranks: {error}")
    return converted


def _convert(checkpoint: Path, converted: Path) -> str | None:
    from deepspeed.checkpoint import ds_to_universal

    from ds_cmli.checkpoint.io import no_code

    remove(converted)
    arguments = argparse.Namespace(
        input_folder=str(checkpoint),
        output_folder=str(converted),
        # In this process: forks of one that has a process group and threads are asking for trouble.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        converted.mkdir(parents=True)
        with no_code(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(arguments)
    except (OSError, RuntimeError, ValueError) as error:
        remove(converted)
        return str(error).splitlines()[0]
    return None


def mend(optimizer: Any, groups: list[dict[str, Any]]) -> None:
    """Put right what DeepSpeed's loader of a universal checkpoint gets wrong under ZeRO-3 (0.19.8).

    It gives all parameter groups the settings of the first, and thus weight decay to those that must have none; and
    one shared step counter to all, which then counts each update several times.

    Args:
        groups: settings of the groups as the engine was built.
    """
    for group, built in zip(optimizer.param_groups, groups, strict=True):
        group.update({name: value for name, value in built.items() if name not in ("lr", "initial_lr")})
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def remove(converted: Path) -> None:
    shutil.rmtree(converted.parent, ignore_errors=True)
