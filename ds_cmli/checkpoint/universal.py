"""A checkpoint for other ranks, ZeRO stages or precisions: DeepSpeed's universal checkpoint.

ZeRO partitions fp32 weights and optimizer states, each stage differently. The universal form holds
them complete, in `zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt` for each parameter. DeepSpeed
converts and loads it. Until it has been loaded, the universal form takes about the same disk space
as the checkpoint.
"""

import argparse
import contextlib
import io
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from ds_cmli.checkpoint.files import no_code
from ds_cmli.common.errors import UserError, first_line
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import TrainEngine

CONVERTED = "universal.writing"  # the next checkpoint removes incomplete and left-over conversions
SHARED = "shared.pt"  # the state that is not of single parameters, see `_write_shared`
MOMENTS = ("exp_avg", "exp_avg_sq")
# The state of a dynamic loss scaler.
SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
COUNTERS = ("global_steps", "global_samples", "skipped_steps")


class _State(NamedTuple):
    """What is not of single parameters."""

    groups: list[dict[str, Any]]  # the optimizer's
    scale: dict[str, Any]  # of the loss scaler, or empty
    step: float | Tensor  # number of updates


def convert(checkpoint: Path, names: list[list[str]]) -> Path:
    """Write the universal form of a verified checkpoint and return its folder.

    Only rank 0 writes. Collective.

    Args:
        names: the names of the parameters in each of the optimizer's groups.

    Raises:
        UserError: on every rank, if it cannot be written.
    """
    converted = checkpoint.parent / CONVERTED / checkpoint.name
    mine = _convert(checkpoint, converted, names) if distributed.is_main() else None
    error = distributed.broadcast_object(mine)  # collective
    if error is not None:
        raise UserError(
            f"{checkpoint}: cannot be converted to other ranks, ZeRO stage or precision: {error}"
        )
    return converted


def _convert(checkpoint: Path, converted: Path, names: list[list[str]]) -> str | None:
    from deepspeed.checkpoint import ds_to_universal

    remove(converted)
    # DeepSpeed uses paths as glob patterns, so it is given links whose names have no special
    # characters.
    plain = Path(tempfile.mkdtemp())
    (plain / "from").symlink_to(checkpoint.absolute())
    (plain / "to").symlink_to(converted.absolute())
    arguments = argparse.Namespace(
        input_folder=str(plain / "from"),
        output_folder=str(plain / "to"),
        # No worker processes: forking a process with threads and a process group can deadlock.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        converted.mkdir(parents=True)
        with (
            no_code(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            ds_to_universal.main(arguments)
            _reshape(converted)
            optimizer = _load(converted / "zero" / "optimizer_state.pt")
            inner = optimizer.get("optimizer_state_dict", {"state": {}})  # only stage 3 has it
            step = inner["state"].get(0, {}).get("step")
            if step is None:
                step = _load(converted / "zero" / names[0][0] / "step.pt")
            scaler = optimizer.get("loss_scaler")
            scale = {} if scaler is None else vars(scaler)
            _write_shared(converted, _State(optimizer["param_groups"], scale, step))
    except KeyError as error:
        remove(converted)
        return (
            f"it has no {error}; the state of Adam and AdamW after their first update can be "
            "converted"
        )
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        remove(converted)
        return first_line(error)
    finally:
        shutil.rmtree(plain)
    return None


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _reshape(converted: Path) -> None:
    """Restore the shapes that stage 3 has left flat in DeepSpeed's files."""
    for group in _load(sorted(converted.glob("*model_states.pt"))[0]).get("param_shapes") or ():
        for name, shape in group.items():
            for key in ("fp32", *MOMENTS):
                file = converted / "zero" / name / f"{key}.pt"
                value = _load(file)
                if isinstance(value, Tensor):
                    torch.save({"param": value.view(shape)}, file)


def _write_shared(converted: Path, state: _State) -> None:
    """Write `SHARED`, and the files with the same content that DeepSpeed's loaders expect."""
    model = _load(sorted(converted.glob("*model_states.pt"))[0])
    groups = []
    for group in state.groups:
        groups.append({name: value for name, value in group.items() if name != "params"})
    scale = {}
    if state.scale.get("last_overflow_iter") is not None:
        scale = {name: state.scale[name] for name in SCALE if name in state.scale}
    shared = {
        "groups": groups,
        "scale": scale,
        "step": float(state.step),
        "schedule": model["lr_scheduler"],
    }
    for name in COUNTERS:
        shared[name] = model[name]
    torch.save(shared, converted / SHARED)
    for folder in (converted / "zero").iterdir():
        if folder.is_dir():
            torch.save(state.step, folder / "step.pt")
    inner = {"param_groups": groups, "state": {0: {"step": state.step}}}
    theirs = {
        "param_groups": groups,  # stages 1 and 2
        "optimizer_state_dict": inner,  # stage 3
        "ds_version": deepspeed.__version__,
    }
    torch.save(theirs, converted / "zero" / "optimizer_state.pt")


def load(step: TrainEngine, converted: Path) -> None:
    """Load a universal checkpoint into the engine. Collective."""
    engine, optimizer = step.engine, step.engine.optimizer
    with no_code():
        shared = _load(converted / SHARED)
        _load_zero(engine, converted)  # collectives
    # DeepSpeed's loader for stage 3 (0.19.8) gives all groups the settings of the first, and thus
    # weight decay to groups that must have none. It also gives all parameters one shared step
    # counter, which then counts each update many times.
    for group, saved in zip(optimizer.param_groups, shared["groups"], strict=True):
        group.update({name: saved[name] for name in group if name in saved})
    is_torch = type(engine.basic_optimizer).__module__.startswith("torch.")
    # A fused (or capturable) optimizer keeps the step counter on the device of the parameters.
    group = optimizer.param_groups[0]
    beside = group.get("fused") or group.get("capturable")
    for parameter, state in optimizer.state.items():
        if is_torch:
            device = parameter.device if beside else "cpu"
            state["step"] = torch.tensor(shared["step"], device=device)
        else:
            state["step"] = int(shared["step"])
    scaler = getattr(optimizer, "loss_scaler", None)
    if getattr(scaler, "last_overflow_iter", None) is not None:
        for name, value in shared["scale"].items():
            if hasattr(scaler, name):
                setattr(scaler, name, value)
    engine.lr_scheduler.load_state_dict(shared["schedule"])
    for name in COUNTERS:
        setattr(engine, name, shared[name])


def _load_zero(engine: DeepSpeedEngine, converted: Path) -> None:
    optimizer = engine.optimizer
    if hasattr(optimizer, "checkpoint_event_prologue"):  # stage 3
        optimizer.checkpoint_event_prologue()
    optimizer.load_state_dict(None, checkpoint_folder=str(converted))
    if hasattr(optimizer, "checkpoint_event_epilogue"):
        optimizer.checkpoint_event_epilogue()  # collective
    if hasattr(optimizer, "update_lp_params"):  # stages 1 and 2
        optimizer.update_lp_params()  # collective


def remove(converted: Path) -> None:
    shutil.rmtree(converted.parent, ignore_errors=True)
