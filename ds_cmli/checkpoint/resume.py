"""Resuming a run: find the newest whole checkpoint, compare its settings, load it.

Other ranks and ZeRO stages go through DeepSpeed's universal checkpoint, which holds fp32 weights
and optimizer states whole, in `zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt` for each parameter.
"""

import argparse
import contextlib
import io
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from ds_cmli.checkpoint import files
from ds_cmli.checkpoint.files import FOLDER, WRITING, CheckpointWriter, no_code
from ds_cmli.checkpoint.state import TrainState, read_of_rank, read_state
from ds_cmli.checkpoint.weights import load_averages, load_frozen, load_module
from ds_cmli.common.errors import UserError, blame, first_line
from ds_cmli.common.pretrained import refused_code
from ds_cmli.config import schedule, settings
from ds_cmli.config.deepspeed_config import BATCH_KEYS, DeepSpeedConfig
from ds_cmli.config.schema import Config
from ds_cmli.data.pairs import BadSamples
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import TrainEngine
from ds_cmli.engine.train_engine import columns
from ds_cmli.models.hf import AVERAGE

EMA_DECAY = "optim.ema_decay"
# The settings of the DeepSpeed JSON that decide the form of DeepSpeed's files.
OF_FILES = (
    "deepspeed.zero_",
    "deepspeed.fp16",
    "deepspeed.bf16",
    "deepspeed.data_types",
    "deepspeed.torch_auto",
)
MOMENTS = ("exp_avg", "exp_avg_sq")
# The state of a dynamic loss scaler.
SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass
class ResumePoint:
    """A verified checkpoint to resume from."""

    path: Path
    state: TrainState
    ranks: int  # number of ranks that wrote it
    lines: list[str]  # messages to the user about damaged checkpoints that were skipped
    # Whether this start partitions weights and optimizer states differently than the checkpoint.
    resharded: bool = False
    changed: bool = False  # whether this start has other settings, by --resume-with-changes

    def is_of(self, folder: Path) -> bool:
        """Whether it is a checkpoint of the run in `folder`."""
        return folder.resolve() in self.path.resolve().parents

    @property
    def same_ranks(self) -> bool:
        return self.ranks == distributed.world_size()

    @property
    def batch_as_asked(self) -> bool:
        """Whether the batch is split over ranks as this start's settings say."""
        return self.same_ranks and not self.state.rebatched


# --- find


def find(resume: str, folder: Path) -> ResumePoint | None:
    """The newest undamaged checkpoint, given `--resume` and the run's folder. Collective.

    Returns:
        None for a fresh start.

    Raises:
        UserError: on every rank, if the path has no checkpoint, or all of them are damaged.
    """
    choice: tuple[list[Path], str | None] | None = None
    if distributed.is_main():
        try:
            choice = _candidates(resume, folder), None
        except UserError as caught:
            choice = [], str(caught)
    paths, error = distributed.broadcast_object(choice)  # collective
    if error is not None:
        raise UserError(error)
    lines: list[str] = []
    for path in paths:
        # The ranks share this work: reading all files takes as long as loading them.
        mine = files.damage(path, distributed.rank(), distributed.world_size())
        damage = next(filter(None, distributed.gather_objects(mine)), None)  # collective
        if damage is None:
            state = read_state(path)
            if resume not in ("auto", "never") and not state.resumed_from:
                state.resumed_from = resume
            return ResumePoint(path, state, state.world_size, lines)
        lines.append(f"checkpoint {path} is damaged: {damage}")
    if lines:
        raise UserError(
            f"{lines[-1]}; there is no other to go on from: give another --output-dir to start over"
        )
    return None


def _candidates(resume: str, folder: Path) -> list[Path]:
    """The checkpoints in the order in which to try them. Raises `UserError`."""
    root = folder / FOLDER
    own = [root / name for name in files.candidates(root)]
    if resume == "never" and own:
        raise UserError(f"--resume is 'never', and {folder} has a run: give another --output-dir")
    if resume in ("auto", "never"):
        return own
    path = Path(resume).absolute()
    if path.is_dir() and path.name in files.names(path.parent):
        root, paths = path.parent, [path]
    else:
        root = path if path.name == FOLDER else path / FOLDER
        paths = [root / name for name in files.candidates(root)]
    if own and root != own[0].parent.absolute():
        if any(_resumed_from(checkpoint) == resume for checkpoint in own):
            return own  # the same command again
        raise UserError(
            f"--resume is {resume!r}, and {folder} has checkpoints of its own: leave out --resume, "
            "or give another --output-dir"
        )
    if not paths:
        raise UserError(f"--resume is {resume!r}: no checkpoint there; give a run's output folder")
    return paths


def _resumed_from(checkpoint: Path) -> str:
    with contextlib.suppress(UserError):
        return read_state(checkpoint).resumed_from
    return ""


# --- compare


def rebatch(point: ResumePoint | None, ds_config: DeepSpeedConfig) -> DeepSpeedConfig:
    """The DeepSpeed JSON with the batch of the run to resume, if the ranks were or are others.

    The global batch and thus the number of negatives stay the same, and so does gradient
    accumulation: accumulated micro-batches cannot replace ranks, because they do not see each
    other's negatives.

    Raises:
        UserError: the batch is not divisible by the number of ranks.
    """
    if point is None or point.batch_as_asked:
        return ds_config
    total, accumulation = point.state.train_batch_size, point.state.accumulation
    ranks = distributed.world_size()
    negatives = total // accumulation
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
    say: Callable[[str], None],
    fingerprint: Mapping[str, object] | None = None,
) -> TrainState:
    """The state to continue from, or a fresh one, with the settings and the batch of this start.

    Args:
        fingerprint: `Data.fingerprint`, which is compared like the settings.

    Raises:
        UserError: the run to resume had other settings, which are listed, without `with_changes`.
    """
    now = settings.compared(config, ds_config, fingerprint)
    # What a source gives before training is evaluated first.
    state = TrainState(evaluated=not config.student.source)
    if point is not None:
        state = point.state
        for line in point.lines:
            say(f"{line}; trying the one before")
        changed = settings.differences(state.config, now, point.batch_as_asked)
        if changed and not with_changes:
            raise UserError(
                f"the run in {point.path.parent.parent} was made with other settings: "
                f"{'; '.join(changed)}. Give the old ones, another --output-dir, or "
                "--resume-with-changes"
            )
        point.changed = bool(changed)
        changes = f" with changes: {'; '.join(changed)}" if changed else ""
        say(f"resuming from {point.path}{changes}")
        before, after = (
            {k: v for k, v in values.items() if k.startswith(OF_FILES)}
            for values in (state.config, now)
        )
        point.resharded = before != after or not point.same_ranks
        if point.resharded:
            ranks = f"written by {point.ranks} ranks, read by {distributed.world_size()}"
            say(f"{ranks}: through a universal checkpoint")
        state.rebatched = not point.batch_as_asked
        averages = bool(state.config.get(EMA_DECAY)) != bool(now[EMA_DECAY])
        if averages or any(line.startswith(("data.", "sources.")) for line in changed):
            # Results of averaged and of plain weights, or on other data, cannot be compared.
            state.best, state.worse_in_row = {}, 0
    state.sums = torch.zeros(columns(config.loss))
    state.config = now
    state.world_size = distributed.world_size()
    state.train_batch_size, state.accumulation = ds_config.train_batch, ds_config.accumulation
    return state


# --- load


def load(
    point: ResumePoint | None,
    state: TrainState,
    engine: TrainEngine,
    bad: BadSamples,
    with_changes: bool,
) -> None:
    """Restore the engine, this rank's part of `state`, counts of bad samples and generators.

    Without a checkpoint, nothing is restored. Collective.
    """
    state.sums = state.sums.to(engine.device)
    if point is None:
        return
    rank, path = distributed.rank(), point.path
    with blame(f"{path}: does not fit the model and the optimizer of this start"):
        _load_engine(point, engine, with_changes)  # collectives
    problem = None
    try:
        with blame(f"{path}: rank-{rank}.pt is no state of a rank"):
            ranks, seed = distributed.world_size(), state.sampler["seed"]
            state.restore(read_of_rank(path, point.ranks, rank, ranks, seed), bad)
    except UserError as error:
        problem = str(error)
    distributed.raise_together(problem)  # collective


def _load_engine(point: ResumePoint, train_engine: TrainEngine, with_changes: bool) -> None:
    engine, path = train_engine.engine, point.path
    fresh = []  # the settings of each parameter group
    for group in engine.optimizer.param_groups:
        fresh.append({k: v for k, v in group.items() if k not in ("params", "lr")})
    of_schedule = dict(engine.lr_scheduler.state_dict())
    engine.checkpoint_engine = CheckpointWriter()
    if point.resharded:
        converted = _convert(path, train_engine.names)  # collective
        _load_universal(train_engine, converted)  # collectives
        distributed.gather_objects(None)  # collective: all ranks have read it
        if distributed.is_main():
            files.remove(converted.parent)
    else:
        with no_code():
            engine.load_checkpoint(  # collectives
                str(path.parent), tag=path.name, custom_load_fn=load_module
            )
    frozen = [name for name in files.read_checksums(path) if name.startswith("../frozen-")]
    for name in frozen:
        load_frozen(path / name, train_engine)  # collectives
    load_averages(path / AVERAGE, train_engine)
    if with_changes:
        # This start's rates, weight decay and schedule, which loading has overwritten.
        for group, new in zip(engine.optimizer.param_groups, fresh, strict=True):
            group.update(new)
        schedule.with_new_settings(engine.lr_scheduler, of_schedule, engine.optimizer.param_groups)


# --- other ranks, stages and precisions


def _convert(checkpoint: Path, names: list[list[str]]) -> Path:
    """Write the universal form of a verified checkpoint beside it; only rank 0 writes. Collective.

    Args:
        names: the names of the parameters in each of the optimizer's groups.

    Raises:
        UserError: on every rank, if it cannot be written.
    """
    converted = checkpoint.parent / f"universal{WRITING}" / checkpoint.name
    error = None
    if distributed.is_main():
        try:
            _write_universal(checkpoint, converted, names[0][0])
        except KeyError as missing:
            error = f"it has no {missing}; that of Adam and AdamW after their first update can be"
        except Exception as caught:
            error = refused_code(caught) or first_line(caught)
        if error is not None:
            files.remove(converted.parent)
    error = distributed.broadcast_object(error)  # collective
    if error is not None:
        raise UserError(
            f"{checkpoint}: cannot be converted to other ranks, ZeRO stage or precision: {error}"
        )
    return converted


def _write_universal(checkpoint: Path, converted: Path, first: str) -> None:
    from deepspeed.checkpoint import ds_to_universal

    files.remove(converted.parent)
    converted.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as plain, no_code():
        # DeepSpeed uses paths as glob patterns, so it is given links whose names have no special
        # characters.
        for name, target in (("from", checkpoint), ("to", converted)):
            Path(plain, name).symlink_to(target.absolute())
        arguments = argparse.Namespace(
            input_folder=f"{plain}/from",
            output_folder=f"{plain}/to",
            # No worker processes: forking a process with threads and a process group can deadlock.
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        silent = io.StringIO()
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            ds_to_universal.main(arguments)
        model_file = min(converted.glob("*model_states.pt"))
        model = _load(model_file)
        for group in model.get("param_shapes") or ():  # stage 3 leaves the files flat
            for name, shape in group.items():
                for key in ("fp32", *MOMENTS):
                    file = converted / "zero" / name / f"{key}.pt"
                    value = _load(file)
                    if isinstance(value, Tensor):
                        torch.save({"param": value.view(shape)}, file)
        # What DeepSpeed's loaders expect, and none of its stages writes for the others.
        optimizer = _load(converted / "zero" / "optimizer_state.pt")
        inner = optimizer.get("optimizer_state_dict", {"state": {}})  # only stage 3 has it
        step = inner["state"].get(0, {}).get("step")
        if step is None:
            step = _load(converted / "zero" / first / "step.pt")
        for folder in (converted / "zero").iterdir():
            if folder.is_dir():
                torch.save(step, folder / "step.pt")
        groups = []
        for group in optimizer["param_groups"]:
            groups.append({name: value for name, value in group.items() if name != "params"})
        inner = {"param_groups": groups, "state": {0: {"step": step}}}
        scaler = optimizer.get("loss_scaler")
        scale = {} if scaler is None else vars(scaler)
        theirs = {
            "param_groups": groups,  # stages 1 and 2
            "optimizer_state_dict": inner,  # stage 3
            "ds_version": deepspeed.__version__,
            "scale": scale,  # ours
        }
        torch.save(theirs, converted / "zero" / "optimizer_state.pt")
        for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
            if not (converted / name).exists():
                shutil.copyfile(model_file, converted / name)


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _load_universal(step: TrainEngine, converted: Path) -> None:
    """Load a universal checkpoint into the engine. Collective."""
    engine, optimizer = step.engine, step.engine.optimizer
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
