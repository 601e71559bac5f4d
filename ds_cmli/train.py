"""Train the student: `deepspeed ds_cmli/train.py --deepspeed_config ds_configs/zero2.json`

The same script starts under `deepspeed`, `torchrun`, `srun` and plain `python`. Reads top to bottom:
configuration -> processes -> resume -> step -> loop.
"""

import sys

# Run by its path, this file's folder comes first on sys.path and would hide packages named like our modules.
sys.path[:] = [p for p in sys.path if p != __file__.rsplit("/", 1)[0]]

import os  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import click  # noqa: E402

from ds_cmli.common.cli import GroupedCommand, option, run_command, say  # noqa: E402
from ds_cmli.common.errors import UserError  # noqa: E402
from ds_cmli.config.deepspeed_config import DeepSpeedConfig  # noqa: E402
from ds_cmli.config.options import OUTPUT, WHAT, add, given_optim, resolve_config  # noqa: E402
from ds_cmli.config.schema import Config  # noqa: E402
from ds_cmli.faults import preemption  # noqa: E402
from ds_cmli.memory.profiles import Profiles  # noqa: E402


@click.command(cls=GroupedCommand, context_settings={"help_option_names": ["-h", "--help"]})
@add(*WHAT, *OUTPUT)
@option("Checkpoints", "--resume", default="auto", show_default=True, metavar="auto|never|PATH",
        help="auto: go on with the run that --output-dir holds. PATH: start from another one.")  # fmt: skip
@option("Checkpoints", "--resume-with-changes", is_flag=True, help="Also where settings differ from the run's.")
@option("Profiling", "--profile", metavar="FIRST:LAST", help="Trace these steps with torch.profiler, into profile/.")
@option("Profiling", "--profile-memory", type=int, metavar="STEPS",
        help="Measure the first steps' memory beside the predicted one, into memory.json.")  # fmt: skip
@option("DeepSpeed", "--dry-run", is_flag=True, help="Check everything, print the resolved configuration, and stop.")
@option("DeepSpeed", "--deepspeed", is_flag=True, hidden=True)  # passed by habit; the JSON is always read
@option("DeepSpeed", "--local_rank", type=int, hidden=True)  # passed by the deepspeed launcher; the same in LOCAL_RANK
def command(preset: str, deepspeed_config: str, settings: tuple[str, ...], resume: str, resume_with_changes: bool,
            dry_run: bool, profile: str | None, profile_memory: int | None, **options: Any) -> int:  # fmt: skip
    """Train a student on image-text pairs with global contrastive, all-pairs CMLI and Target-CMLI losses.

    With no options it trains the preset "demo" to its end. On TERM, USR1, USR2 or INT it saves and ends with exit
    code 85; started again in the same way, it goes on.
    """
    config = resolve_config(preset, settings, options)
    profiles = Profiles(profile, profile_memory)
    ds_config = DeepSpeedConfig.load(deepspeed_config)
    for line in ds_config.overruled(given_optim(settings, options)):
        say(line)
    return train(config, ds_config, dry_run, resume, resume_with_changes, profiles)


def train(
    config: Config, ds_config: DeepSpeedConfig, dry_run: bool, resume: str, with_changes: bool, profiles: Profiles
) -> int:
    """Returns the exit code: 0 at the end of the run, `preemption.EXIT_CODE` where it is to be started again."""
    # --- configuration: on every rank, before the processes meet, and before imports that take seconds
    check_early(config, ds_config, resume, profiles)
    from ds_cmli.common import quiet

    quiet.silence()
    from ds_cmli.common import determinism
    from ds_cmli.data import assets, build_data
    from ds_cmli.distributed import process_group as distributed

    distributed.map_launcher_environment()
    if config.run.deterministic:
        determinism.enforce()
    data, mistake = None, None
    try:
        assets.fetch(assets.used(config))
        data = build_data(config.data, config.run.seed)
        for line in data.notices:
            say(line)
    except UserError as error:
        if os.environ["WORLD_SIZE"] == "1":
            raise
        mistake = str(error)  # perhaps on this node alone, where nobody would hear of it: told once the ranks have met
    from ds_cmli import engine as step
    from ds_cmli.checkpoint import lock, run_folder
    from ds_cmli.faults import watchdog

    ds_config = step.on_this_device(ds_config)

    # --- processes
    watchdog.hold_back_nccl(config.run.watchdog)
    try:
        device = distributed.init(stop=preemption.stop)  # collective
    except preemption.Preempted:
        say(f"stopped before step 1 by {preemption.requested()}: start again to go on")
        return preemption.EXIT_CODE
    try:
        distributed.raise_together(mistake)  # collective
        folder = run_folder.make(config, resume, dry_run)  # collective
        with watchdog.Watchdog(config.run.watchdog) as dog, lock.held(folder):  # collective
            return run(config, ds_config, data, device, folder, dry_run, resume, with_changes, profiles, dog)
    finally:
        distributed.shutdown()


def check_early(config: Config, ds_config: DeepSpeedConfig, resume: str, profiles: Profiles) -> None:
    """What a new run would be refused for later, after imports that take seconds. Raises `UserError`."""
    if config.optim.steps is not None:
        profiles.left(config.optim.steps, 0, lambda line: None)
    ranks = os.environ.get("WORLD_SIZE", "1" if "SLURM_STEP_ID" not in os.environ else None)
    if ranks and resume == "auto" and not (Path(config.run.output_dir) / "checkpoint").exists():
        ds_config.batch(config.optim.micro_batch, int(ranks))


def plan(config: Config, ds_config: DeepSpeedConfig, data: Any) -> tuple[DeepSpeedConfig, Any, int]:
    """The DeepSpeed JSON with nothing left to "auto", the sampler, and the number of optimizer steps."""
    from ds_cmli import engine as step
    from ds_cmli.data import GlobalBatchSampler

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    total, micro_batch, accumulation = ds_config.batch(config.optim.micro_batch, ranks)
    sampler = GlobalBatchSampler(len(data.train), micro_batch, rank, ranks, config.run.seed)
    steps = config.optim.steps
    if steps is None:
        assert config.optim.epochs is not None
        steps = max(1, int(config.optim.epochs * sampler.batches_per_epoch / accumulation))
    say(
        f"batch: {micro_batch} pairs per rank x {accumulation} accumulation x {ranks} ranks = {total} pairs a step; "
        f"{steps} steps; negatives from {micro_batch * ranks} pairs"
    )
    ds_config = step.filled(config, ds_config, ranks, steps)
    for notice in (*ds_config.notices, step.try_out(ds_config, steps)):
        say(notice)
    return ds_config, sampler, steps


def run(
    config: Config, ds_config: DeepSpeedConfig, data: Any, device: Any, folder: Path, dry_run: bool, resume: str,
    with_changes: bool, profiles: Profiles, dog: Any,
) -> int:  # fmt: skip
    """Build everything, put back what there is to go on from, and train. Collective."""
    from ds_cmli import dry_run as dry
    from ds_cmli import engine as step
    from ds_cmli.checkpoint import restore as resuming
    from ds_cmli.checkpoint import run_folder
    from ds_cmli.data import BadSamples
    from ds_cmli.distributed import process_group as distributed
    from ds_cmli.faults import out_of_memory as oom
    from ds_cmli.metrics import NullWriter, Writer
    from ds_cmli.run import Run

    # --- what there is to go on from
    resume = distributed.broadcast_object(run_folder.requeued(resume, folder))  # collective
    found = resuming.find(resume, folder)  # collective
    ds_config, sampler, total_steps = plan(config, resuming.cut_batch(found, ds_config), data)
    state = resuming.state_of(found, config, ds_config, with_changes, say)
    if state.step >= total_steps and state.evaluated:
        say(f"the run in {folder} is finished, {state.step} steps: give another --output-dir to start a new one")
        return 0
    profiles = profiles.left(total_steps, state.step, say)
    bad = BadSamples(config.data.max_bad_share, len(data.train), data.bad)
    accumulation = ds_config.accumulation
    if dry_run:
        own = resuming.fresh(found, config, sampler)
        none: Any = dry.NoEngine(config)
        start = Run(config, data, sampler, none, total_steps, accumulation, folder, state, own, bad, NullWriter(), dog)
        asked = {"resume": resume, "profile": profiles.trace, "profile_memory": profiles.memory}
        try:
            dry.rehearse(start, ds_config, data.vocab_size, device, asked)  # collective
        except preemption.Preempted:
            return preemption.EXIT_CODE
        return 0

    # --- step
    here, notice = step.with_backend(config, device)
    say(notice)
    with oom.ending(here, ds_config, folder, device, dog):  # collective
        trainer = step.build(here, ds_config, data.vocab_size, total_steps, device)
        own = resuming.load(found, trainer, sampler, bad, with_changes)  # collective
        run_folder.settle(resume, found, folder, config, ds_config)  # collective
        writer = Writer(folder, total_steps, state.step) if distributed.is_main() else NullWriter()
        all_of_it = Run(config, data, sampler, trainer, total_steps, accumulation, folder, state, own, bad, writer, dog)
        with profiles.around(trainer, here, ds_config, folder, state.step) as after_step:
            return loop(all_of_it, after_step)  # collective


def loop(run: Any, after_step: Callable[[], None]) -> int:
    """Train to the end, `run` being a `ds_cmli.run.Run`. Collectives in every call."""
    from ds_cmli.data import train_loader

    settings, state = run.config.run, run.state
    loader = train_loader(run.data, run.sampler, run.config.data.workers)
    loader.worker_init_fn = preemption.shield
    batches = iter(loader)
    due = state.step == run.total_steps  # the run was stopped in its last evaluation
    try:
        while True:
            if not state.evaluated:
                run.evaluate()
            if due:
                run.save()
            if state.step == run.total_steps:
                break
            timed = run.train_step(batches)
            after_step()
            last = state.step == run.total_steps
            if run.logs():
                run.log()
            state.evaluated = not (last or (settings.eval_every and state.step % settings.eval_every == 0))
            due = timed or last or bool(settings.save_every and state.step % settings.save_every == 0)
    except preemption.Preempted:
        run.stop()
        return preemption.EXIT_CODE
    run.finish()
    return 0


def main() -> None:
    preemption.install()
    run_command(command)


if __name__ == "__main__":
    main()
