"""What a start decides before an engine is built: the loop begins from it."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ds_cmli.common.cli import say
from ds_cmli.common.errors import UserError, blame
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import Config
from ds_cmli.faults import preemption
from ds_cmli.memory.profile import Profiles

if TYPE_CHECKING:  # these take seconds to import, and options are checked before
    import torch

    from ds_cmli.checkpoint.resume import ResumePoint
    from ds_cmli.checkpoint.state import TrainState
    from ds_cmli.data.batch import Batch
    from ds_cmli.data.build import Data
    from ds_cmli.data.pairs import BadSamples
    from ds_cmli.distributed.process_group import CollectiveFlags
    from ds_cmli.engine import Plan
    from ds_cmli.faults.watchdog import Watchdog


@dataclass(frozen=True)
class LaunchOptions:
    """The options of one start that are not settings of the run."""

    resume: str
    with_changes: bool  # --resume-with-changes
    profiles: Profiles
    raises: bool = False  # whether the process goes on after the run, or after its error: `fit`


@dataclass(frozen=True)
class RankContext:
    """Where a rank of the run is, once the processes have met."""

    device: "torch.device"
    folder: Path  # the run's, the same on every rank
    watchdog: "Watchdog"


@dataclass(frozen=True)
class Prepared:
    """A run in the state in which training starts or goes on, but without an engine."""

    config: Config
    plan: "Plan"
    data: "Data"
    place: RankContext
    # With the value of --resume that is followed, and the profiles that are left.
    start: LaunchOptions
    point: "ResumePoint | None"  # the checkpoint to resume from
    state: "TrainState"  # what the next step depends on besides the engine
    bad: "BadSamples"
    flags: "CollectiveFlags"  # what ranks decide together


def check_early(config: Config, ds_config: DeepSpeedConfig, start: LaunchOptions) -> None:
    """Raise `UserError` for what would otherwise be refused only when the processes have met."""
    profiles = start.profiles
    if config.run.report_to == "wandb":
        with blame("run.report_to is 'wandb'"):
            import wandb  # noqa: F401
    if config.run.compile != "off" and profiles.memory is not None:
        raise UserError(
            f"run.compile is {config.run.compile!r} and --profile-memory is {profiles.memory}: "
            "what is measured is compared with the prediction, which is of the blocks as they are: "
            "leave out one of the two"
        )
    if config.optim.steps is not None:
        profiles.left(config.optim.steps, 0, lambda line: None)
    if start.resume == "auto" and not (Path(config.run.output_dir) / "checkpoint").exists():
        ds_config.batch(config.optim.micro_batch, int(os.environ["WORLD_SIZE"]))


def load_data(config: Config) -> "tuple[Data | None, str | None]":
    """Load the data. Returns it, or a mistake, which is raised once the ranks have met.

    It may be on this node alone, where nobody would hear of it. A single rank raises it at once, as
    `UserError`.
    """
    from ds_cmli.data import assets
    from ds_cmli.data.build import build_data

    try:
        for name in assets.used(config):
            assets.fetch(name)
        data = build_data(config.data, config.run.seed)
        say(*data.summary)
        return data, None
    except UserError as error:
        if os.environ["WORLD_SIZE"] == "1":
            raise
        return None, str(error)


def prepare(
    config: Config,
    ds_config: DeepSpeedConfig,
    data: "Data",
    place: RankContext,
    start: LaunchOptions,
) -> Prepared | None:
    """Find what there is to go on from, and plan the run. Collective.

    Args:
        ds_config: the user's DeepSpeed JSON, as this device can run it.

    Returns:
        None if the run is finished already; a line says so.
    """
    from ds_cmli.checkpoint import resume as checkpoint
    from ds_cmli.checkpoint import run_folder
    from ds_cmli.data.pairs import BadSamples
    from ds_cmli.distributed import process_group as distributed
    from ds_cmli.distributed.process_group import CollectiveFlags
    from ds_cmli.engine import make_plan

    folder, with_changes = place.folder, start.with_changes
    resume = distributed.broadcast_object(run_folder.requeued(start.resume, folder))  # collective
    point = checkpoint.find(resume, folder)  # collective
    batch = checkpoint.rebatch(point, ds_config)
    plan = make_plan(config, batch, data.mixture)  # collective
    state = checkpoint.state_of(point, config, plan.deepspeed, with_changes, say, data.fingerprint)
    finished = state.step == plan.total_steps and state.evaluated
    finished = finished or state.out_of_patience(config.run.patience)
    own = point is None or (point.is_of(folder) and not point.changed)
    if state.step > plan.total_steps or (finished and not own):
        assert point is not None, "a fresh start has steps to take"
        raise UserError(
            f"{point.path} is of a run that has ended, and this start has {plan.total_steps} steps "
            f"in all, {state.step} of them done: nothing would be trained: give more --steps, or "
            "start without --resume"
        )
    if finished:
        say(
            f"the run in {folder} is finished, {state.step} steps: "
            "give another --output-dir to start a new one"
        )
        return None
    if point is not None:
        plan.sampler.load_state_dict(state.sampler)
    profiles = start.profiles.left(plan.total_steps, state.step, say)
    bad = BadSamples(config.data.max_bad_share, len(data.train))  # type: ignore[arg-type]
    followed = replace(start, resume=resume, profiles=profiles)
    flags = CollectiveFlags()  # collective
    return Prepared(config, plan, data, place, followed, point, state, bad, flags)


class Taken(NamedTuple):
    """A micro-batch, and what the ranks have agreed on as they took it."""

    batch: "Batch"
    stop: bool  # a rank has been signalled
    save_due: bool  # a checkpoint is due by a rank's clock


def next_batch(
    ready: Prepared,
    batches: "Iterator[Batch]",
    save_due: Callable[[], bool] = lambda: False,
    before_raising: Callable[[], None] = lambda: None,
) -> Taken:
    """Take the next micro-batch on all ranks together. Collective.

    Args:
        save_due: tells whether a checkpoint is due by this rank's clock.
        before_raising: called on all ranks where the data of one fails, before its error is raised.
    """
    batch: Batch | None = None
    error: Exception | None = None
    try:
        batch = next(batches)
    except UserError as caught:  # of a loading process: its traceback precedes its message
        error = UserError(str(caught).strip().splitlines()[-1].split("UserError: ", 1)[-1])
    except Exception as caught:  # one rank's data: the others must not wait for it in a collective
        error = caught
    ready.place.watchdog.heartbeat()
    signalled = preemption.requested() is not None
    failed, stop, due = ready.flags.any(batch is None, signalled, save_due())  # collective
    if failed:
        before_raising()  # collectives
        ready.flags.fail_together(error)  # collective
    assert batch is not None
    return Taken(batch, stop, due)
