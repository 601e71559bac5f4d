"""A checkpoint for another number of ranks, another ZeRO stage or another precision: DeepSpeed's
universal checkpoint.

ZeRO partitions fp32 weights and optimizer states, each stage differently. The universal form holds
them complete, in `zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt` for each parameter. DeepSpeed
converts checkpoints of ZeRO and loads into ZeRO. This module converts checkpoints without ZeRO, and
loads into an engine without ZeRO. Until it has been loaded, the universal form takes about the same
disk space as the checkpoint.
"""

import argparse
import contextlib
import io
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_cmli.checkpoint.files import no_code
from ds_cmli.common.errors import UserError
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import TrainEngine

CONVERTED = "universal.writing"  # the next checkpoint removes incomplete and left-over conversions
SHARED = "shared.pt"  # the state that is not of single parameters, see `_write_shared`
MOMENTS = ("exp_avg", "exp_avg_sq")
SCALE = (
    "cur_scale",
    "cur_iter",
    "last_overflow_iter",
    "cur_hysteresis",
)  # the state of a dynamic loss scaler
COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def convert(checkpoint: Path, names: list[list[str]]) -> Path:
    """Write the universal form of a verified checkpoint and return its folder. Collective; only
    rank 0 writes.

    Args:
        names: the names of the parameters in each of the optimizer's groups.

    Raises:
        UserError: on every rank, if it cannot be written.
    """
    converted = checkpoint.parent / CONVERTED / checkpoint.name
    error = distributed.broadcast_object(
        _convert(checkpoint, converted, names) if distributed.is_main() else None
    )  # collective
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
            if any(checkpoint.glob("*_optim_states.pt")):
                ds_to_universal.main(arguments)
                _reshape(converted)
                optimizer = _load(converted / "zero" / "optimizer_state.pt")
                inner = optimizer.get("optimizer_state_dict", {"state": {}})  # only stage 3 has it
                step = inner["state"].get(0, {}).get("step")
                if step is None:
                    step = _load(converted / "zero" / names[0][0] / "step.pt")
                groups, scale = (
                    optimizer["param_groups"],
                    vars(optimizer.get("loss_scaler") or argparse.Namespace()),
                )
            else:
                groups, scale, step = _convert_without_zero(checkpoint, converted, names)
            _write_shared(converted, groups, scale, step)
    except KeyError as error:
        remove(converted)
        return f"it has no {error}; the state of Adam and AdamW after their first update can be converted"
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        remove(converted)
        return (str(error) or type(error).__name__).splitlines()[0]
    finally:
        shutil.rmtree(plain)
    return None


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _reshape(converted: Path) -> None:
    """Restore the tensors' shapes: for stage 3 DeepSpeed writes flat tensors, which its stages 1
    and 2 cannot load.
    """
    for group in _load(sorted(converted.glob("*model_states.pt"))[0]).get("param_shapes") or ():
        for name, shape in group.items():
            for key in ("fp32", *MOMENTS):
                file = converted / "zero" / name / f"{key}.pt"
                value = _load(file)
                if isinstance(value, Tensor):
                    torch.save({"param": value.view(shape)}, file)


def _write_shared(
    converted: Path, groups: list[dict[str, Any]], scale: dict[str, Any], step: Any
) -> None:
    """Write `SHARED`, and the files with the same content that DeepSpeed's loaders expect."""
    import deepspeed

    model = _load(sorted(converted.glob("*model_states.pt"))[0])
    plain = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    shared = {
        "groups": plain,
        "scale": {k: scale[k] for k in SCALE if k in scale}
        if scale.get("last_overflow_iter") is not None
        else {},
        "step": float(step),
        "schedule": model["lr_scheduler"],
        **{name: model[name] for name in COUNTERS},
    }
    torch.save(shared, converted / SHARED)
    for folder in (converted / "zero").iterdir():
        if folder.is_dir():
            torch.save(step, folder / "step.pt")
    theirs = {
        "param_groups": plain,  # stages 1 and 2
        "optimizer_state_dict": {"param_groups": plain, "state": {0: {"step": step}}},  # stage 3
        "ds_version": deepspeed.__version__,
    }
    torch.save(theirs, converted / "zero" / "optimizer_state.pt")


def _convert_without_zero(
    checkpoint: Path, converted: Path, names: list[list[str]]
) -> tuple[list[dict[str, Any]], dict[str, Any], Any]:
    """Write the parameters' files for a checkpoint without ZeRO; returns parameter groups, loss
    scale and step.
    """
    file = checkpoint / "mp_rank_00_model_states.pt"
    saved = _load(file)
    module, optimizer = saved["module"], saved["optimizer"]
    inner = optimizer.get("optimizer_state_dict", optimizer)
    if "fp32_groups_flat" in optimizer:  # one flat tensor for each group
        members, masters = names, list(optimizer["fp32_groups_flat"])
    else:
        members = [[name] for group in names for name in group]
        if "fp32_groups" in optimizer:
            masters = [master for group in optimizer["fp32_groups"] for master in group]
        else:
            masters = [module[name] for (name,) in members]
    for number, (several, master) in enumerate(zip(members, masters, strict=True)):
        sizes = [module[name].numel() for name in several]
        state = {"fp32": master, **{key: inner["state"][number][key] for key in MOMENTS}}
        for key, value in state.items():
            for name, part in zip(several, value.flatten()[: sum(sizes)].split(sizes), strict=True):
                folder = converted / "zero" / name
                folder.mkdir(parents=True, exist_ok=True)
                torch.save(
                    {"param": part.reshape(module[name].shape).float().clone()},
                    folder / f"{key}.pt",
                )
    shutil.copy2(file, converted)
    return inner["param_groups"], optimizer, inner["state"][0]["step"]


def load(step: TrainEngine, converted: Path) -> None:
    """Load a universal checkpoint into the engine. Collective."""
    engine, optimizer = step.engine, step.engine.optimizer
    with no_code():
        shared = _load(converted / SHARED)
        if engine.zero_optimization():
            _load_zero(engine, converted)  # collectives
        else:
            _load_without_zero(step, converted)
    # DeepSpeed's loader for stage 3 (0.19.8) gives all groups the settings of the first, and thus
    # weight decay to groups that must have none. It also gives all parameters one shared step
    # counter, which then counts each update many times.
    for group, saved in zip(optimizer.param_groups, shared["groups"], strict=True):
        group.update({name: saved[name] for name in group if name in saved})
    is_torch = type(engine.basic_optimizer).__module__.startswith("torch.")
    # A fused (or capturable) optimizer keeps the step counter on the device of the parameters.
    beside = any(optimizer.param_groups[0].get(name) for name in ("fused", "capturable"))
    for parameter, state in optimizer.state.items():
        device = parameter.device if beside else "cpu"
        state["step"] = (
            torch.tensor(shared["step"], device=device) if is_torch else int(shared["step"])
        )
    scaler = getattr(optimizer, "loss_scaler", None) or getattr(
        optimizer, "loss_scale_config", None
    )
    if getattr(scaler, "last_overflow_iter", None) is not None:
        vars(scaler).update(
            {name: value for name, value in shared["scale"].items() if hasattr(scaler, name)}
        )
    engine.lr_scheduler.load_state_dict(shared["schedule"])
    for name in COUNTERS:
        setattr(engine, name, shared[name])


def _load_zero(engine: Any, converted: Path) -> None:
    optimizer = engine.optimizer
    if hasattr(optimizer, "checkpoint_event_prologue"):  # stage 3
        optimizer.checkpoint_event_prologue()
    optimizer.load_state_dict(None, checkpoint_folder=str(converted))
    if hasattr(optimizer, "checkpoint_event_epilogue"):
        optimizer.checkpoint_event_epilogue()  # collective
    if hasattr(optimizer, "update_lp_params"):  # stages 1 and 2
        optimizer.update_lp_params()  # collective


def _load_without_zero(step: TrainEngine, converted: Path) -> None:
    optimizer = step.engine.optimizer
    parameters = dict(step.objective.named_parameters())
    for several, master in _masters(step, parameters):

        def read(key: str, several=several, master=master) -> Tensor:
            parts = [
                _load(converted / "zero" / name / f"{key}.pt")["param"].flatten()
                for name in several
            ]
            return torch.cat(parts).to(master).view_as(master)

        with torch.no_grad():
            master.copy_(read("fp32"))
            sizes = [parameters[name].numel() for name in several]
            for name, part in zip(several, master.flatten().split(sizes), strict=True):
                parameters[name].copy_(part.view_as(parameters[name]))
        optimizer.state[master] = {key: read(key) for key in MOMENTS}


def _masters(step: TrainEngine, parameters: dict[str, Any]) -> Iterator[tuple[list[str], Tensor]]:
    """The fp32 tensors that an optimizer without ZeRO updates, each with the names of the
    parameters in it.
    """
    optimizer = step.engine.optimizer
    if hasattr(optimizer, "fp32_groups_flat"):  # FP16_Optimizer
        yield from zip(step.names, optimizer.fp32_groups_flat, strict=True)
        return
    groups = getattr(optimizer, "fp32_groups", None)  # FP16_UnfusedOptimizer
    for number, names in enumerate(step.names):
        masters = groups[number] if groups is not None else [parameters[name] for name in names]
        yield from (([name], master) for name, master in zip(names, masters, strict=True))


def remove(converted: Path) -> None:
    shutil.rmtree(converted.parent, ignore_errors=True)
