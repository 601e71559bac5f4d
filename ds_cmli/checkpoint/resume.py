"""Resuming a run: find the newest whole checkpoint, compare its settings, load it.

Other ranks and ZeRO stages go through DeepSpeed's universal checkpoint, which holds fp32 weights
and optimizer states whole, in `zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt` for each parameter.
"""

import argparse
import io
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from ds_cmli.checkpoint import save
from ds_cmli.checkpoint.save import CHECKSUMS, FOLDER, WRITING, CheckpointWriter
from ds_cmli.checkpoint.state import TrainState, read_of_rank, read_state
from ds_cmli.checkpoint.weights import load_averages, load_frozen
from ds_cmli.commands import print_line
from ds_cmli.config import schema
from ds_cmli.config.deepspeed_config import BATCH_KEYS, DeepSpeedConfig
from ds_cmli.config.schema import Config
from ds_cmli.data.pairs import BadSamples
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import TrainEngine
from ds_cmli.engine.train_engine import columns
from ds_cmli.errors import UserError, blame
from ds_cmli.files import read_json
from ds_cmli.models.hf import AVERAGE
from ds_cmli.pretrained import loading

# The sections of the DeepSpeed JSON that decide the form of DeepSpeed's files.
OF_FILES = re.compile(r"zero_|fp16|bf16|data_types|torch_auto")
# How the batch is split over ranks: these settings change with the number of ranks.
BATCH_SPLIT = ("optim.micro_batch", "deepspeed.train_micro_batch_size_per_gpu")
# What the state of a schedule says of the position in it; the rest are settings.
POSITION = ("last_epoch", "_step_count", "_last_lr", "last_batch_iteration", "lr_lambdas")
# All that PyTorch's loader builds from a file besides tensors and plain values.
torch.serialization.add_safe_globals(
    [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
)
# The state of a dynamic loss scaler.
SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass
class ResumePoint:
    """A verified checkpoint to resume from."""

    path: Path
    state: TrainState  # its `world_size` is the number of ranks that wrote it
    resharded: bool = False  # whether this start partitions weights and moments otherwise
    changed: bool = False  # whether this start has other settings, by --resume-with-changes

    def is_of(self, folder: Path) -> bool:
        """Whether it is a checkpoint of the run in `folder`."""
        return folder.resolve() in self.path.resolve().parents

    @property
    def batch_as_asked(self) -> bool:
        """Whether the batch is split over ranks as this start's settings say."""
        return self.state.world_size == distributed.world_size() and not self.state.rebatched


# --- find


def find(resume: str, folder: Path) -> ResumePoint | None:
    """The newest undamaged checkpoint, given `--resume` and the run's folder; None: a fresh start.

    Raises `UserError` if the path has no checkpoint, or all of them are damaged. Collective.
    """
    path: Path | None = None
    with distributed.raised_together():  # collective
        if distributed.is_main():
            line = None
            for path in _candidates(resume, folder):
                print_line(line and f"{line}; trying the one before")
                damage = save.damage(path)
                line = damage and f"checkpoint {path} is damaged: {damage}"
                if line is None:
                    break
            if line is not None:
                raise UserError(f"{line}; there is no other: give another --output-dir")
    path = distributed.broadcast_object(path)  # collective
    if path is None:
        return None
    state = read_state(path)
    if resume not in ("auto", "never"):
        state.resumed_from = state.resumed_from or resume
    return ResumePoint(path, state)


def root_of(resume: str) -> Path:
    """The folder of checkpoints that --resume PATH names: a run's, itself, or that of one of it."""
    path = Path(resume).absolute()
    if (path / CHECKSUMS).is_file():
        return path.parent
    return path if path.name == FOLDER else path / FOLDER


def _candidates(resume: str, folder: Path) -> list[Path]:
    """The checkpoints in the order in which to try them. Raises `UserError`."""
    own = save.candidates(folder / FOLDER)
    # A job has followed "never" or a path before it was requeued.
    if resume == "auto" or (own and os.environ.get("SLURM_RESTART_COUNT", "0") != "0"):
        return own
    if resume == "never":
        if own:
            raise UserError(f"--resume is 'never', and {folder} has a run: give another folder")
        return []
    root, path = root_of(resume), Path(resume).absolute()
    paths = [path] if path.parent == root else save.candidates(root)
    if own and root != own[0].parent.absolute():
        for checkpoint in own:
            with suppress(UserError):
                if read_state(checkpoint).resumed_from == resume:
                    return own  # the same command again
        of_its_own = f"{folder} has checkpoints of its own: leave it out, or give another folder"
        raise UserError(f"--resume is {resume!r}, and {of_its_own}")
    if not paths:
        raise UserError(f"--resume is {resume!r}: no checkpoint there; give a run's output folder")
    return paths


# --- compare


def rebatch(point: ResumePoint | None, ds_config: DeepSpeedConfig) -> DeepSpeedConfig:
    """The DeepSpeed JSON with the batch of the run to resume, if the ranks were or are others.

    The number of negatives stays the same, and so does gradient accumulation: micro-batches cannot
    replace ranks, because they do not see each other's negatives. Raises `UserError`.
    """
    if point is None or point.batch_as_asked:
        return ds_config
    total, accumulation = point.state.train_batch_size, point.state.accumulation
    negatives, ranks = total // accumulation, distributed.world_size()
    if negatives % ranks:
        fitting = ", ".join(str(n) for n in range(1, negatives + 1) if negatives % n == 0)
        batch = f"a batch of {total} = {negatives} pairs x {accumulation} accumulation"
        raise UserError(
            f"the run to resume has {batch}, which {ranks} ranks cannot share evenly: start it on "
            f"a number of ranks out of {fitting}"
        )
    sizes = dict(zip(BATCH_KEYS, (total, negatives // ranks, accumulation), strict=True))
    keys = ("train_batch_size", "gradient_accumulation_steps")
    given = {key: ds_config[key] for key in keys if ds_config.get(key, "auto") != "auto"}
    return DeepSpeedConfig.of({**ds_config, **sizes, **given})


def state_of(
    point: ResumePoint | None,
    config: Config,
    ds_config: DeepSpeedConfig,
    with_changes: bool,
    fingerprint: Mapping[str, object] | None = None,
) -> TrainState:
    """The state to continue from, or a fresh one, with the settings and the batch of this start.

    `fingerprint` is that of the data, compared like the settings. Raises `UserError` if the run to
    resume had other settings, which are listed, without `with_changes`.
    """
    now = schema.compared(config, ds_config, fingerprint)
    # What a source gives before training is evaluated first.
    state = TrainState(evaluated=not config.student.source)
    if point is not None:
        state = point.state
        free = () if point.batch_as_asked else BATCH_SPLIT
        changed = [x for x in schema.differences(state.config, now) if not x.startswith(free)]
        if changed and not with_changes:
            raise UserError(
                f"the run in {point.path.parent.parent} was made with other settings: "
                f"{'; '.join(changed)}. Give the old ones, another folder, or --resume-with-changes"
            )
        point.changed = bool(changed)
        changes = f" with changes: {'; '.join(changed)}" if changed else ""
        print_line(f"resuming from {point.path}{changes}")
        ranks = distributed.world_size()
        sections = (settings["deepspeed"].items() for settings in (state.config, now))
        before, after = ({k: v for k, v in s if OF_FILES.match(k)} for s in sections)
        point.resharded = before != after or state.world_size != ranks
        if point.resharded:
            print_line(f"from {state.world_size} ranks to {ranks}: through a universal checkpoint")
        state.rebatched = not point.batch_as_asked
        if any(line.startswith(("data.", "sources.", "optim.ema_decay")) for line in changed):
            # Results of averaged and of plain weights, or on other data, cannot be compared.
            state.best, state.worse_in_row = {}, 0
    state.sums = torch.zeros(columns(config.loss))
    state.config = now
    state.train_batch_size = ds_config["train_batch_size"]
    state.accumulation = ds_config["gradient_accumulation_steps"]
    return state


# --- load


def load(
    point: ResumePoint | None, state: TrainState, engine: TrainEngine, bad: BadSamples
) -> None:
    """Restore the engine, this rank's part of `state`, and what that captured. Collective."""
    state.sums = state.sums.to(engine.device)
    if point is None:
        return
    rank, path = distributed.rank(), point.path
    with blame(f"{path}: does not fit the model and the optimizer of this start"):
        _load_engine(point, engine)  # collectives
    with distributed.raised_together(), blame(f"{path}: rank-{rank}.pt is no state of a rank"):
        state.restore(read_of_rank(path, state.world_size), bad)  # collective: on leaving


def _load_engine(point: ResumePoint, train_engine: TrainEngine) -> None:
    engine, path = train_engine.engine, point.path
    groups = engine.optimizer.param_groups
    fresh = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in groups]
    of_schedule = dict(engine.lr_scheduler.state_dict())
    engine.checkpoint_engine = CheckpointWriter()
    if point.resharded:
        converted = path.parent / f"universal{WRITING}" / path.name
        try:
            with distributed.raised_together():  # collective
                if distributed.is_main():
                    _convert(path, converted)
            _load_universal(train_engine, converted)  # collectives
            distributed.gather_objects(None)  # collective: all ranks have read it
        finally:
            if distributed.is_main():
                shutil.rmtree(converted.parent, ignore_errors=True)
    else:
        with loading(hub=False):  # collectives; frozen weights are not in its files
            engine.load_checkpoint(str(path.parent), tag=path.name, load_module_strict=False)
    for name in read_json(path / CHECKSUMS):
        if name.startswith("../frozen-"):
            load_frozen(path / name, train_engine)  # collectives
    load_averages(path / AVERAGE, train_engine)
    if point.changed:
        # This start's rates, weight decay and schedule, which loading has overwritten.
        for group, new in zip(engine.optimizer.param_groups, fresh, strict=True):
            group.update(new)
        schedule = engine.lr_scheduler
        vars(schedule).update({k: v for k, v in of_schedule.items() if k not in POSITION})
        for group, rate in zip(engine.optimizer.param_groups, schedule.get_lr(), strict=True):
            group["lr"] = rate


# --- other ranks, stages and precisions


def _convert(checkpoint: Path, converted: Path) -> None:
    """Write the universal form of a verified checkpoint. Raises `UserError`."""
    from deepspeed.checkpoint import ds_to_universal

    # No worker processes: forking a process with threads and a process group can deadlock.
    how: dict[str, Any] = {"num_extract_workers": 1, "num_merge_workers": 1, "strict": True}
    how |= {"keep_temp_folder": False, "inject_missing_state": True}
    how |= {"input_folder": str(checkpoint), "output_folder": str(converted)}
    silent = io.StringIO()
    problem = f"{checkpoint}: cannot be converted to other ranks, ZeRO stage or precision"
    with blame(problem), loading(hub=False), redirect_stdout(silent), redirect_stderr(silent):
        shutil.rmtree(converted.parent, ignore_errors=True)
        converted.mkdir(parents=True)
        ds_to_universal.main(argparse.Namespace(**how))
        _complete(converted)


def _complete(converted: Path) -> None:
    """Add what DeepSpeed's loaders expect, and none of its stages writes for the others."""
    zero, model_file = converted / "zero", min(converted.glob("*model_states.pt"))
    model = _load(model_file)
    for group in model.get("param_shapes") or ():  # stage 3 leaves the files flat
        for name, shape in group.items():
            for key in ("fp32", "exp_avg", "exp_avg_sq"):
                value = _load(zero / name / f"{key}.pt")
                if isinstance(value, Tensor):
                    torch.save({"param": value.view(shape)}, zero / name / f"{key}.pt")
    optimizer = _load(zero / "optimizer_state.pt")
    step = torch.tensor(float(model["global_steps"] - model["skipped_steps"]))
    for folder in filter(Path.is_dir, zero.iterdir()):
        torch.save(step, folder / "step.pt")
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer["param_groups"]]
    scaler = optimizer.get("loss_scaler")
    complete = {
        "param_groups": groups,  # stages 1 and 2
        "optimizer_state_dict": {"param_groups": groups, "state": {0: {"step": step}}},  # stage 3
        "ds_version": deepspeed.__version__,
        "scale": {} if scaler is None else vars(scaler),  # ours
    }
    torch.save(complete, zero / "optimizer_state.pt")
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        if not (converted / name).exists():
            shutil.copyfile(model_file, converted / name)


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _load_universal(train_engine: TrainEngine, converted: Path) -> None:
    """Load a universal checkpoint into the engine. Collective."""
    engine, optimizer = train_engine.engine, train_engine.engine.optimizer
    universal = mock.patch.object(engine._config, "load_universal_checkpoint", True)
    with loading(hub=False), universal:
        engine.load_checkpoint(str(converted.parent), tag=converted.name)  # collectives
        module = _load(min(converted.glob("*model_states.pt")))["module"]
        for name, buffer in engine.module.named_buffers():
            if name in module:
                buffer.copy_(module[name])
        saved = _load(converted / "zero" / "optimizer_state.pt")
    updates = float(engine.global_steps - engine.skipped_steps)
    # DeepSpeed's loader for stage 3 (0.19.8) gives all groups the settings of the first, and thus
    # weight decay to groups that must have none. It also gives all parameters one shared step
    # counter, which then counts each update many times.
    for group, values in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({name: values[name] for name in group if name in values})
    is_torch = type(engine.basic_optimizer).__module__.startswith("torch.")
    # A fused (or capturable) optimizer keeps the step counter on the device of the parameters.
    group = optimizer.param_groups[0]
    beside = group.get("fused") or group.get("capturable")
    for parameter, state in optimizer.state.items():
        device = parameter.device if beside else "cpu"
        state["step"] = torch.tensor(updates, device=device) if is_torch else int(updates)
    scaler, scale = getattr(optimizer, "loss_scaler", None), saved["scale"]
    if isinstance(scaler, DynamicLossScaler) and scale.keys() >= {*SCALE}:
        vars(scaler).update({name: scale[name] for name in SCALE})
