"""Resuming a run: find the newest whole checkpoint, compare its settings, load it.

Other ranks and ZeRO stages go through DeepSpeed's universal checkpoint, which holds fp32 weights
and optimizer states whole, in `zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt` for each parameter.
"""

import argparse
import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from ds_cmli.checkpoint.save import FOLDER, WRITING, CheckpointWriter
from ds_cmli.checkpoint.state import TrainState, read_of_rank, read_state
from ds_cmli.checkpoint.weights import load_averages, load_frozen, load_module
from ds_cmli.common import UserError, blame, one_line, say
from ds_cmli.config import schedule, schema
from ds_cmli.config.deepspeed_config import BATCH_KEYS, DeepSpeedConfig
from ds_cmli.config.schema import Config
from ds_cmli.data.pairs import BadSamples
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import TrainEngine
from ds_cmli.engine.train_engine import columns
from ds_cmli.models.hf import AVERAGE

# The sections of the DeepSpeed JSON that decide the form of DeepSpeed's files.
OF_FILES = ("zero_", "fp16", "bf16", "data_types", "torch_auto")
# All that PyTorch's loader builds from a file besides tensors and plain values.
DEEPSPEED_CLASSES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
# The state of a dynamic loss scaler.
SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass
class ResumePoint:
    """A verified checkpoint to resume from."""

    path: Path
    state: TrainState
    ranks: int  # number of ranks that wrote it
    resharded: bool = False  # whether this start partitions weights and moments otherwise
    changed: bool = False  # whether this start has other settings, by --resume-with-changes

    def is_of(self, folder: Path) -> bool:
        """Whether it is a checkpoint of the run in `folder`."""
        return folder.resolve() in self.path.resolve().parents

    @property
    def batch_as_asked(self) -> bool:
        """Whether the batch is split over ranks as this start's settings say."""
        return self.ranks == distributed.world_size() and not self.state.rebatched


# --- find


def find(resume: str, folder: Path) -> ResumePoint | None:
    """The newest undamaged checkpoint, given `--resume` and the run's folder; None: a fresh start.

    Raises `UserError` if the path has no checkpoint, or all of them are damaged. Collective.
    """
    paths: list[Path] = []
    with distributed.raised_together():  # collective
        if distributed.is_main():
            paths = _candidates(resume, folder)
    line = None
    for path in distributed.broadcast_object(paths):  # collective
        if line is not None:
            say(f"{line}; trying the one before")
        # The ranks share this work: reading all files takes as long as loading them.
        mine = save.damage(path, distributed.rank(), distributed.world_size())
        damage = next(filter(None, distributed.gather_objects(mine)), None)  # collective
        if damage is None:
            state = read_state(path)
            if resume not in ("auto", "never"):
                state.resumed_from = state.resumed_from or resume
            return ResumePoint(path, state, state.world_size)
        line = f"checkpoint {path} is damaged: {damage}"
    if line is not None:
        raise UserError(
            f"{line}; there is no other to go on from: give another --output-dir to start over"
        )
    return None


def _candidates(resume: str, folder: Path) -> list[Path]:
    """The checkpoints in the order in which to try them. Raises `UserError`."""
    root = folder / FOLDER
    own = [root / name for name in save.candidates(root)]
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" and own:
        return own  # the job has followed "never" or a path before it was requeued
    if resume == "never" and own:
        raise UserError(f"--resume is 'never', and {folder} has a run: give another --output-dir")
    if resume in ("auto", "never"):
        return own
    path = Path(resume).absolute()
    if path.is_dir() and path.name in save.names(path.parent):
        root, paths = path.parent, [path]
    else:
        root = path if path.name == FOLDER else path / FOLDER
        paths = [root / name for name in save.candidates(root)]
    if own and root != own[0].parent.absolute():
        for checkpoint in own:
            with contextlib.suppress(UserError):
                if read_state(checkpoint).resumed_from == resume:
                    return own  # the same command again
        raise UserError(
            f"--resume is {resume!r}, and {folder} has checkpoints of its own: leave out --resume, "
            "or give another --output-dir"
        )
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
        raise UserError(
            f"the run to resume has a batch of {total} = {negatives} pairs x {accumulation} "
            f"accumulation, which {ranks} ranks cannot share evenly: start it on a number of ranks "
            f"out of {fitting}"
        )
    sizes = (total, negatives // ranks, accumulation)
    batch: dict[str, Any] = dict(zip(BATCH_KEYS, sizes, strict=True))
    for key in ("train_batch_size", "gradient_accumulation_steps"):
        if ds_config.get(key, "auto") != "auto":
            batch[key] = ds_config[key]
    return ds_config.replaced(**batch)


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
        changed = schema.differences(state.config, now, point.batch_as_asked)
        if changed and not with_changes:
            raise UserError(
                f"the run in {point.path.parent.parent} was made with other settings: "
                f"{'; '.join(changed)}. Give the old ones, another --output-dir, or "
                "--resume-with-changes"
            )
        point.changed = bool(changed)
        changes = f" with changes: {'; '.join(changed)}" if changed else ""
        say(f"resuming from {point.path}{changes}")
        sections = tuple(f"deepspeed.{section}" for section in OF_FILES)
        names = [name for name in {*state.config, *now} if name.startswith(sections)]
        point.resharded = any(state.config.get(name, name) != now.get(name, name) for name in names)
        ranks = distributed.world_size()
        if point.resharded or point.ranks != ranks:
            point.resharded = True
            say(f"written by {point.ranks} ranks, read by {ranks}: through a universal checkpoint")
        state.rebatched = not point.batch_as_asked
        if any(line.startswith(("data.", "sources.", "optim.ema_decay")) for line in changed):
            # Results of averaged and of plain weights, or on other data, cannot be compared.
            state.best, state.worse_in_row = {}, 0
    state.sums = torch.zeros(columns(config.loss))
    state.config = now
    state.world_size = distributed.world_size()
    state.train_batch_size, state.accumulation = ds_config.train_batch, ds_config.accumulation
    return state


# --- load


@contextmanager
def no_code() -> Iterator[None]:
    """No library runs code from files that it reads inside, even if it asks for that."""
    force = mock.patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1")
    with force, torch.serialization.safe_globals(DEEPSPEED_CLASSES):
        yield


def load(
    point: ResumePoint | None, state: TrainState, engine: TrainEngine, bad: BadSamples
) -> None:
    """Restore the engine, this rank's part of `state`, counts of bad samples and generators.

    Without a checkpoint, nothing is restored. Collective.
    """
    state.sums = state.sums.to(engine.device)
    if point is None:
        return
    rank, path = distributed.rank(), point.path
    with blame(f"{path}: does not fit the model and the optimizer of this start"):
        _load_engine(point, engine)  # collectives
    no_state = f"{path}: rank-{rank}.pt is no state of a rank"
    with distributed.raised_together(), blame(no_state):  # collective
        state.restore(read_of_rank(path, point.ranks, rank, distributed.world_size()), bad)


def _load_engine(point: ResumePoint, train_engine: TrainEngine) -> None:
    engine, path = train_engine.engine, point.path
    fresh = []  # the settings of each parameter group
    for group in engine.optimizer.param_groups:
        fresh.append({k: v for k, v in group.items() if k not in ("params", "lr")})
    of_schedule = dict(engine.lr_scheduler.state_dict())
    engine.checkpoint_engine = CheckpointWriter()
    if point.resharded:
        converted = path.parent / f"universal{WRITING}" / path.name
        with distributed.raised_together():  # collective
            if distributed.is_main():
                _convert(path, converted)
        _load_universal(train_engine, converted)  # collectives
        distributed.gather_objects(None)  # collective: all ranks have read it
        if distributed.is_main():
            shutil.rmtree(converted.parent, ignore_errors=True)
    else:
        with no_code():
            engine.load_checkpoint(  # collectives
                str(path.parent), tag=path.name, custom_load_fn=load_module
            )
    for name in save.read_checksums(path):
        if name.startswith("../frozen-"):
            load_frozen(path / name, train_engine)  # collectives
    load_averages(path / AVERAGE, train_engine)
    if point.changed:
        # This start's rates, weight decay and schedule, which loading has overwritten.
        for group, new in zip(engine.optimizer.param_groups, fresh, strict=True):
            group.update(new)
        schedule.with_new_settings(engine.lr_scheduler, of_schedule, engine.optimizer.param_groups)


# --- other ranks, stages and precisions


def _convert(checkpoint: Path, converted: Path) -> None:
    """Write the universal form of a verified checkpoint. Raises `UserError`."""
    from deepspeed.checkpoint import ds_to_universal

    # No worker processes: forking a process with threads and a process group can deadlock.
    how: dict[str, Any] = {"num_extract_workers": 1, "num_merge_workers": 1, "strict": True}
    how |= {"keep_temp_folder": False, "inject_missing_state": True}
    silent = io.StringIO()
    try:
        shutil.rmtree(converted.parent, ignore_errors=True)
        converted.mkdir(parents=True)
        with tempfile.TemporaryDirectory() as plain, no_code():
            # DeepSpeed uses paths as glob patterns, so it is given links whose names have no
            # special characters.
            for name, folder in (("input_folder", checkpoint), ("output_folder", converted)):
                Path(plain, name).symlink_to(folder.absolute())
                how[name] = f"{plain}/{name}"
            with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
                ds_to_universal.main(argparse.Namespace(**how))
            _complete(converted)
    except Exception as error:
        shutil.rmtree(converted.parent, ignore_errors=True)
        why = one_line(error)
        if isinstance(error, KeyError):
            why = f"it has no {error}; that of Adam and AdamW after their first update can be"
        raise UserError(
            f"{checkpoint}: cannot be converted to other ranks, ZeRO stage or precision: {why}"
        ) from None


def _complete(converted: Path) -> None:
    """Add what DeepSpeed's loaders expect, and none of its stages writes for the others."""
    zero, model_file = converted / "zero", min(converted.glob("*model_states.pt"))
    for group in _load(model_file).get("param_shapes") or ():  # stage 3 leaves the files flat
        for name, shape in group.items():
            for key in ("fp32", "exp_avg", "exp_avg_sq"):
                value = _load(zero / name / f"{key}.pt")
                if isinstance(value, Tensor):
                    torch.save({"param": value.view(shape)}, zero / name / f"{key}.pt")
    optimizer = _load(zero / "optimizer_state.pt")
    inner = optimizer.get("optimizer_state_dict", {"state": {}})  # only stage 3 has it
    step = inner["state"].get(0, {}).get("step")
    if step is None:
        step = _load(next(zero.glob("*/step.pt")))
    for folder in zero.iterdir():
        if folder.is_dir():
            torch.save(step, folder / "step.pt")
    groups = []
    for group in optimizer["param_groups"]:
        groups.append({name: value for name, value in group.items() if name != "params"})
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
    with no_code():
        engine._config.load_universal_checkpoint = True
        engine.load_checkpoint(str(converted.parent), tag=converted.name)  # collectives
        engine._config.load_universal_checkpoint = False
        module = _load(min(converted.glob("*model_states.pt")))["module"]
        for name, buffer in engine.module.named_buffers():
            if name in module:
                buffer.copy_(module[name])
        saved = _load(converted / "zero" / "optimizer_state.pt")
    updates = float(saved["optimizer_state_dict"]["state"][0]["step"])
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
    scaler = getattr(optimizer, "loss_scaler", None)
    if getattr(scaler, "last_overflow_iter", None) is not None:
        for name in SCALE:
            if saved["scale"].get("last_overflow_iter") is not None and name in saved["scale"]:
                setattr(scaler, name, saved["scale"][name])
