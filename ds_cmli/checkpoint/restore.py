"""Resuming a run: check that a checkpoint fits this start, and restore from it.

Everything read here has been verified against the checkpoint's checksums; DeepSpeed's files and
ours are loaded without running code from them.
"""

import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ds_cmli.checkpoint import universal
from ds_cmli.checkpoint.contents import ResumePoint
from ds_cmli.checkpoint.files import CheckpointWriter, no_code
from ds_cmli.checkpoint.train_state import (
    OfRank,
    TrainState,
    read_of_rank,
    redistribute,
)
from ds_cmli.checkpoint.weights import load_averages, load_frozen, load_module, parts
from ds_cmli.common.errors import UserError, first_line
from ds_cmli.common.pretrained import refused_code
from ds_cmli.config import schedule, settings
from ds_cmli.config.deepspeed_config import BATCH_KEYS, DeepSpeedConfig
from ds_cmli.config.schema import Config
from ds_cmli.data.pairs import BadSamples
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import TrainEngine
from ds_cmli.engine.train_engine import columns
from ds_cmli.models.weights import not_finite

EMA_DECAY = "optim.ema_decay"
# The settings of the DeepSpeed JSON that decide the form of DeepSpeed's files.
OF_FILES = (
    "deepspeed.zero_",
    "deepspeed.fp16",
    "deepspeed.bf16",
    "deepspeed.data_types",
    "deepspeed.torch_auto",
)


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
    if point is None:
        # What a source gives before training is evaluated first.
        state = TrainState(evaluated=not config.student.source)
    else:
        state = point.state
        _compare(point, now, with_changes, say)
        if bool(state.config.get(EMA_DECAY)) != bool(now[EMA_DECAY]):
            # Results of averaged and of plain weights cannot be compared.
            state.best, state.worse_in_row = {}, 0
    state.sums = torch.zeros(columns(config.loss))
    state.config, state.digest = now, settings.digest(now)
    state.world_size = distributed.world_size()
    state.train_batch_size, state.accumulation = ds_config.train_batch, ds_config.accumulation
    return state


def _compare(
    point: ResumePoint, now: dict[str, object], with_changes: bool, say: Callable[[str], None]
) -> None:
    """Say what differs from the checkpoint's settings, and mark what follows from it."""
    for line in point.lines:
        say(line)
    changed = settings.differences(point.state.config, now, point.batch_as_asked)
    if changed and not with_changes:
        raise UserError(
            f"the run in {point.path.parent.parent} was made with other settings: "
            f"{'; '.join(changed)}. Give the old ones, another --output-dir, or "
            "--resume-with-changes"
        )
    point.changed = bool(changed)
    changes = f" with changes: {'; '.join(changed)}" if changed else ""
    say(f"resuming from {point.path}{changes}")
    point.resharded = _is_resharded(point, now)
    if point.resharded or not point.same_ranks:
        how = "through a universal checkpoint" if point.resharded else "as it is"
        say(f"written by {point.ranks} ranks, read by {distributed.world_size()}: {how}")
    point.state.rebatched = not point.batch_as_asked


def _is_resharded(point: ResumePoint, now: dict[str, object]) -> bool:
    """Whether this start would write other DeepSpeed files than those of the checkpoint."""
    before = {k: v for k, v in point.state.config.items() if k.startswith(OF_FILES)}
    after = {k: v for k, v in now.items() if k.startswith(OF_FILES)}
    return before != after or not point.same_ranks


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
    _load_engine(point, engine, with_changes)  # collectives
    problem = None
    try:
        state.put_back(_of_rank(point, state), bad)
    except UserError as error:
        problem = str(error)
    except Exception as error:  # a foreign file, whose checksum fits: it may hold anything
        reason = refused_code(error) or first_line(error)
        problem = (
            f"{point.path}: rank-{distributed.rank()}.pt is no state of a rank: {reason}: "
            "--resume another one"
        )
    distributed.raise_together(problem)  # collective


def _of_rank(point: ResumePoint, state: TrainState) -> OfRank:
    rank = distributed.rank()
    if point.same_ranks:
        return read_of_rank(point.path, rank)
    every = [read_of_rank(point.path, r) for r in range(point.ranks)]
    return redistribute(every, rank, distributed.world_size(), state.sampler["seed"])


def _load_engine(point: ResumePoint, train_engine: TrainEngine, with_changes: bool) -> None:
    engine, path = train_engine.engine, point.path
    fresh = []  # the settings of each parameter group
    for group in engine.optimizer.param_groups:
        fresh.append({k: v for k, v in group.items() if k not in ("params", "lr")})
    of_schedule = dict(engine.lr_scheduler.state_dict())
    try:
        if point.resharded:
            converted = universal.convert(path, train_engine.names)  # collective
            universal.load(train_engine, converted)  # collectives
            distributed.gather_objects(None)  # collective: all ranks have read it
            if distributed.is_main():
                universal.remove(converted)
        else:
            engine.checkpoint_engine = CheckpointWriter()
            with no_code():
                engine.load_checkpoint(  # collectives
                    str(path.parent), tag=path.name, custom_load_fn=load_module
                )
        load_frozen(path, train_engine.objective)  # collectives
        load_averages(path, train_engine)
        if with_changes:
            # This start's rates, weight decay and schedule, which loading has overwritten.
            for group, new in zip(engine.optimizer.param_groups, fresh, strict=True):
                group.update(new)
            groups = engine.optimizer.param_groups
            schedule.with_new_settings(engine.lr_scheduler, of_schedule, groups)
        states = [*engine.optimizer.state.values()]
        mine = not_finite({"weights": parts(engine), "optimizer": states})
        bad = next(filter(None, distributed.gather_objects(mine)), None)  # collective
        if bad is not None:
            raise UserError(
                f"{path}: its {bad} is not finite: give an earlier checkpoint by --resume PATH"
            )
    except UserError:
        raise
    except Exception as error:  # of a library if shapes or names differ, on all ranks
        # torch lists missing and unexpected names after the first line; those of a large model fill
        # pages.
        line = textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" ...")
        raise UserError(
            f"{path}: does not fit the model and the optimizer of this start: "
            f"{refused_code(error) or line}: give the run's own settings, or another --output-dir "
            "for a new run"
        ) from error
