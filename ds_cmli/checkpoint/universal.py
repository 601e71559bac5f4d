"""Loading a checkpoint on other ranks, or at another ZeRO stage or precision.

It goes through DeepSpeed's universal checkpoint, which holds fp32 weights and optimizer states
whole, in `zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt` for each parameter. Rank 0 writes it beside
the run's checkpoints, and removes it after it was loaded.
"""

import argparse
import io
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import deepspeed
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch import Tensor

from ds_cmli.checkpoint.storage import WRITING, load_tensors
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import TrainEngine
from ds_cmli.errors import blame
from ds_cmli.pretrained import loading

# The state of a dynamic loss scaler.
SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def load_resharded(checkpoint: Path, train_engine: TrainEngine) -> None:
    """Load a verified checkpoint of any ranks, ZeRO stage and precision. Collective.

    Raises `UserError` if it cannot be converted.
    """
    converted = checkpoint.parent / f"universal{WRITING}" / checkpoint.name
    try:
        with distributed.raised_together():  # collective
            if distributed.is_main():
                _write_universal(checkpoint, converted)
        _load_universal(converted, train_engine)  # collectives
        distributed.gather_objects(None)  # collective: all ranks have read it
    finally:
        if distributed.is_main():
            shutil.rmtree(converted.parent, ignore_errors=True)


def _write_universal(checkpoint: Path, converted: Path) -> None:
    """Write the universal form of a verified checkpoint. Raises `UserError`."""
    from deepspeed.checkpoint import ds_to_universal

    options = argparse.Namespace(
        input_folder=str(checkpoint),
        output_folder=str(converted),
        # No worker processes: forking a process with threads and a process group can deadlock.
        num_extract_workers=1,
        num_merge_workers=1,
        strict=True,
        keep_temp_folder=False,
        inject_missing_state=True,
    )
    output = io.StringIO()  # DeepSpeed's lines and progress bars
    message = f"{checkpoint}: cannot be converted to other ranks, ZeRO stage or precision"
    with blame(message), loading(hub=False), redirect_stdout(output), redirect_stderr(output):
        shutil.rmtree(converted.parent, ignore_errors=True)
        converted.mkdir(parents=True)
        ds_to_universal.main(options)
        _add_what_loaders_expect(converted)


def _add_what_loaders_expect(converted: Path) -> None:
    """Add what the loader of each stage reads, but the converter writes only for some stages."""
    zero = converted / "zero"
    model_file = min(converted.glob("*model_states.pt"))
    model = load_tensors(model_file)
    for group in model.get("param_shapes") or ():  # stage 3 leaves the files flat
        for name, shape in group.items():
            for key in ("fp32", "exp_avg", "exp_avg_sq"):
                value = load_tensors(zero / name / f"{key}.pt")
                if isinstance(value, Tensor):
                    torch.save({"param": value.view(shape)}, zero / name / f"{key}.pt")
    step = torch.tensor(float(model["global_steps"] - model["skipped_steps"]))
    for folder in filter(Path.is_dir, zero.iterdir()):
        torch.save(step, folder / "step.pt")
    optimizer = load_tensors(zero / "optimizer_state.pt")
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer["param_groups"]
    ]
    scaler = optimizer.get("loss_scaler")
    complete = {
        "param_groups": groups,  # stages 1 and 2
        "optimizer_state_dict": {"param_groups": groups, "state": {0: {"step": step}}},  # stage 3
        "ds_version": deepspeed.__version__,
        "scale": {} if scaler is None else vars(scaler),  # read by `_load_universal`
    }
    torch.save(complete, zero / "optimizer_state.pt")
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        if not (converted / name).exists():
            shutil.copyfile(model_file, converted / name)


def _load_universal(converted: Path, train_engine: TrainEngine) -> None:
    """Load a universal checkpoint into the engine. Collective."""
    engine = train_engine.engine
    optimizer = engine.optimizer
    is_universal = mock.patch.object(engine._config, "load_universal_checkpoint", True)
    with loading(hub=False), is_universal:
        engine.load_checkpoint(str(converted.parent), tag=converted.name)  # collectives
        module = load_tensors(min(converted.glob("*model_states.pt")))["module"]
        for name, buffer in engine.module.named_buffers():
            if name in module:
                buffer.copy_(module[name])
        saved = load_tensors(converted / "zero" / "optimizer_state.pt")
    # DeepSpeed's loader for stage 3 (0.19.8) gives all groups the settings of the first, and thus
    # weight decay to groups that must have none. It also gives all parameters one shared step
    # counter, which then counts each update many times.
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({name: saved_group[name] for name in group if name in saved_group})
    updates = float(engine.global_steps - engine.skipped_steps)
    is_torch = type(engine.basic_optimizer).__module__.startswith("torch.")
    # A fused (or capturable) optimizer keeps the step counter on the device of the parameters.
    first_group = optimizer.param_groups[0]
    counts_on_device = first_group.get("fused") or first_group.get("capturable")
    for parameter, state in optimizer.state.items():
        device = parameter.device if counts_on_device else "cpu"
        state["step"] = torch.tensor(updates, device=device) if is_torch else int(updates)
    scaler = getattr(optimizer, "loss_scaler", None)
    scale = saved["scale"]
    if isinstance(scaler, DynamicLossScaler) and scale.keys() >= {*SCALER_STATE}:
        vars(scaler).update({name: scale[name] for name in SCALER_STATE})
