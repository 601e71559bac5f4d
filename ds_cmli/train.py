"""Train the student: `deepspeed ds_cmli/train.py --deepspeed_config ds_configs/zero2.json`

The same script starts under `deepspeed`, `torchrun`, `srun` and plain `python`. It reads top to
bottom: the command, the start (processes, what there is to go on from, the engine), and the loop.
"""

import sys

# Run by its path, this file's folder comes first on sys.path and would hide packages named like our
# modules.
sys.path[:] = [p for p in sys.path if p != __file__.rsplit("/", 1)[0]]

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ds_cmli import hardware
from ds_cmli.commands import print_line, run_command
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.options import ConfigCommand
from ds_cmli.config.presets import load_preset
from ds_cmli.config.schema import Config, Sections
from ds_cmli.distributed import map_launcher_environment
from ds_cmli.errors import UserError, blame
from ds_cmli.faults import preemption
from ds_cmli.libraries import importing, silence
from ds_cmli.memory.profile import Profiles
from ds_cmli.provenance import version

if TYPE_CHECKING:  # it takes seconds to import, and options are checked before
    import torch

    from ds_cmli.data.build import Data
    from ds_cmli.evaluate import zero_shot
    from ds_cmli.faults.watchdog import Watchdog
    from ds_cmli.run import Run

NO_PROFILES = Profiles()


@click.command(cls=ConfigCommand, context_settings={"help_option_names": ["-h", "--help"]})
def command(
    deepspeed_config: str,
    settings: Sections,
    resume: str,
    resume_with_changes: bool,
    profile: str | None,
    profile_memory: int | None,
    dry_run: bool,
) -> int:
    """Train a student on image-text pairs with global contrastive, all-pairs CMLI and Target-CMLI
    losses.

    With no options it trains the preset "quick" to its end. On TERM, USR1, USR2, INT, QUIT or HUP
    it saves and ends with exit code 85; started again in the same way, it resumes.
    """
    map_launcher_environment()
    config = load_preset(None, settings)
    where = config.run.output_dir or "a new folder in runs"
    print_line(f"ds-cmli {version()}: preset {config.run.preset}, to {where}")
    silence()
    ds_config = DeepSpeedConfig.load(deepspeed_config)
    profiles = Profiles(profile, profile_memory)
    if dry_run:
        refuse_contradictions(config, ds_config, resume, profiles)
        print_line(json.dumps({"config": config.to_dict(), "deepspeed": ds_config}, indent=2))
        return 0
    exit_code, _ = train(config, ds_config, resume, resume_with_changes, profiles)
    return exit_code


def refuse_contradictions(
    config: Config, ds_config: DeepSpeedConfig, resume_from: str, profiles: Profiles
) -> None:
    """Raise `UserError` for settings that contradict each other or this machine.

    They are found before anything heavy is imported, and before the processes meet.
    """
    if config.run.report_to == "wandb":
        with blame("run.report_to is 'wandb'"):
            import wandb  # noqa: F401
    if config.run.compile != "off" and profiles.memory_steps is not None:
        raise UserError(
            f"run.compile is {config.run.compile!r} and --profile-memory is "
            f"{profiles.memory_steps}: a prediction knows uncompiled blocks only: leave out one of "
            "the two"
        )
    if config.optim.steps is not None:
        # Called only to raise: no profile is left out before the first step.
        profiles.still_possible(config.optim.steps, 0)
    with blame(f"--output-dir is {config.run.output_dir!r}"):
        has_checkpoints = (Path(config.run.output_dir) / "checkpoint").exists()
    if resume_from == "auto" and not has_checkpoints:
        ds_config.batch(config.optim.micro_batch, int(os.environ["WORLD_SIZE"]))


def train(
    config: Config,
    ds_config: DeepSpeedConfig,
    resume_from: str = "auto",
    accept_changes: bool = False,
    profiles: Profiles = NO_PROFILES,
    on_log: Callable[[int, dict[str, Any]], object] | None = None,
    keeps_process: bool = False,
) -> tuple[int, Path]:
    """Train: what the command and `ds_cmli.fit` call. Collective.

    `accept_changes` is --resume-with-changes. `on_log` is called on rank 0 with the step and the
    columns of each line of `metrics.jsonl`. `keeps_process`: the process goes on after the run.

    Returns the exit code, `preemption.EXIT_CODE` if the run is to be started again, and its folder.
    """
    refuse_contradictions(config, ds_config, resume_from, profiles)
    if config.run.deterministic:
        hardware.enforce_determinism()
    with importing():
        from ds_cmli import engine as engines
    from ds_cmli.checkpoint.lock import run_folder
    from ds_cmli.checkpoint.save import Checkpoints
    from ds_cmli.checkpoint.start import find_start
    from ds_cmli.data.pairs import BadSamples
    from ds_cmli.distributed import process_group as distributed
    from ds_cmli.logs.meter import Meter
    from ds_cmli.logs.writer import NullWriter, Writer
    from ds_cmli.memory import out_of_memory
    from ds_cmli.run import Run

    ds_config = engines.adapt_to_device(ds_config)
    with contextlib.ExitStack() as stack:
        # --- processes and data
        device, watchdog = stack.enter_context(processes(config, keeps_process))  # collective
        data, class_pictures = load_data(config, watchdog)  # collective

        # --- what there is to go on from
        folder = stack.enter_context(run_folder(config, resume_from))  # collective
        start = find_start(config, resume_from, folder)  # collectives
        ds_config = start.keep_batch(ds_config)
        ds_config, sampler, total_steps = engines.make_plan(config, ds_config, data.order)
        start.check(ds_config, accept_changes, data.fingerprint)
        has_ended = start.has_ended(total_steps)
        if has_ended and start.is_whole():  # collective
            return 0, folder
        state = start.state
        profiles = profiles.still_possible(total_steps, state.step)

        # --- the engine; an ended run builds it only if files that follow from its end are missing
        chosen = engines.resolve_backend(config, ds_config, device)  # collective
        release = stack.enter_context(contextlib.ExitStack())  # once `out_of_memory` has counted
        # The tensors of these engines are named if memory runs out.
        exit_on_shortage = out_of_memory.exit_on_shortage(folder, device, keeps_process)
        engines_built = stack.enter_context(exit_on_shortage)
        engine = engines.build(  # collectives
            chosen, ds_config, data.vocab_size, total_steps, device, data.pad_id
        )
        engines_built.append(engine)
        if keeps_process:
            release.callback(engines.release, engine.engine)
        num_samples = len(data.train)  # type: ignore[arg-type]
        bad_samples = BadSamples(config.data.max_bad_share, num_samples)
        start.restore(engine, sampler, bad_samples, data.tokenizer)  # collectives
        if has_ended:
            return 0, folder
        print_line(engines.counts_line(engine.objective, engine.teacher))

        # --- the loop
        writer: Writer | NullWriter = NullWriter()
        with watchdog.slow(), distributed.raised_together():  # a tracker may ask its server
            if distributed.is_main():
                writer = Writer(folder, total_steps, state.step, config.run.report_to, on_log)
        flags = distributed.CollectiveFlags()  # collective
        run = Run(
            config=config,
            data=data,
            class_pictures=class_pictures,
            sampler=sampler,
            total_steps=total_steps,
            state=state,
            engine=engine,
            checkpoints=Checkpoints(folder, engine, config.run, (state.step, state.evaluated)),
            writer=writer,
            meter=Meter(engine, device.type == "cuda" and config.run.compile == "off"),
            bad_samples=bad_samples,
            flags=flags,
            watchdog=watchdog,
            stop_poll=distributed.SpacedFlag(flags),
        )
        profiled = profiles.loop_context(engine, chosen, ds_config, folder, state.step)
        after_step = stack.enter_context(profiled)
        stack.enter_context(preemption.handle_signals())
        return loop(run, after_step), folder  # collectives


@contextlib.contextmanager
def processes(config: Config, keeps_process: bool) -> Iterator[tuple["torch.device", "Watchdog"]]:
    """Join this process with the run's other ranks inside, and watch their progress. Collective."""
    import torch.distributed as dist

    from ds_cmli.distributed import process_group as distributed
    from ds_cmli.faults.watchdog import Watchdog

    group_is_ours = not dist.is_initialized()  # one that the script has made stays
    device = distributed.init()  # collective
    may_be_debugged = keeps_process and os.environ["WORLD_SIZE"] == "1"  # and stand still for long
    with Watchdog(0.0 if may_be_debugged else config.run.watchdog) as watchdog:
        try:
            yield device, watchdog
        finally:
            if group_is_ours:
                distributed.shutdown()


def load_data(
    config: Config, watchdog: "Watchdog"
) -> tuple["Data", dict[str, "zero_shot.ClassPictures"]]:
    """Fetch what the configuration uses, open its data, and print what it is. Collective.

    Returns the data, and the pictures of run.zero_shot by the names of their folders.
    """
    from ds_cmli.data import assets
    from ds_cmli.data.build import build_data
    from ds_cmli.data.shard_cache import opening_progress
    from ds_cmli.distributed import process_group as distributed
    from ds_cmli.evaluate.zero_shot import open_class_folders

    # Mistakes are raised together, because one may be of one node alone.
    with watchdog.counting(opening_progress), distributed.raised_together():
        for name in assets.used(config):
            assets.fetch(name)
        data = build_data(config.data, config.run.seed)
        class_pictures = open_class_folders(config)
    print_line(*data.summary)
    return data, class_pictures


def loop(run: "Run", after_step: Callable[[], None]) -> int:
    """Train to the end, and return the exit code; all ranks meet in the lines marked.

    One step: for each micro-batch, features -> losses over the pairs of all ranks -> backward; then
    clip, update, EMA (`TrainEngine.step`). With optim.negatives = "global_batch" and several
    micro-batches: the features of all of them first, then the losses over their pairs, then each
    micro-batch again (`losses/gradient_cache.py`).
    """
    from ds_cmli.data.pairs import loader

    settings = run.config.run
    state = run.state
    data = run.data
    workers = run.config.data.workers
    loading = loader(
        data.train, data.collate, workers, preemption.block_signals, batch_sampler=run.sampler
    )
    batches = iter(loading)
    save_due = state.step == run.total_steps  # the run was stopped in its last evaluation
    try:
        while True:
            # The evaluation of a step comes before its checkpoint, which holds the result.
            if not state.evaluated:
                run.evaluate()  # collectives
                save_due = save_due or run.checkpoints.due_after_evaluation(state)
            if save_due:
                run.save()  # collectives
            if state.step == run.total_steps or state.out_of_patience(settings.patience):
                break
            micro_batches, save_due_by_clock = run.take_micro_batches(batches)  # collectives
            with run.meter.step(micro_batches):
                # Collectives: one optimizer step.
                losses = run.engine.step(micro_batches, run.watchdog.heartbeat)
            state.step += 1
            run.end_step(losses)  # collectives after a skipped step
            after_step()
            if run.due(settings.log_every):
                run.log()  # collectives, CPU-GPU sync
            state.evaluated = not run.due(settings.eval_every)
            save_due = save_due_by_clock or run.due(settings.save_every)
    except preemption.Preempted:
        run.save_if_changed()  # collectives
        run.writer.close()
        run.checkpoints.require_saved(state)
        signal = preemption.end_request() or "a signal to another rank"
        run.writer.print(
            f"stopped at step {state.step} of {run.total_steps} by {signal}: start again with "
            f"--output-dir {run.checkpoints.folder} to go on"
        )
        return preemption.EXIT_CODE

    run.writer.print(*run.bad_samples.check(run.flags))  # collective
    run.writer.close()
    run.writer.print(*run.checkpoints.closing_lines(state, run.config))
    return 0


def main() -> None:
    run_command(command)


if __name__ == "__main__":
    main()
