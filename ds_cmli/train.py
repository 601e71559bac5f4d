"""Train the student: `deepspeed ds_cmli/train.py --deepspeed_config ds_configs/zero2.json`

The same script starts under `deepspeed`, `torchrun`, `srun` and plain `python`. It reads top to
bottom: configuration, processes, the engine, and the loop. What there is to go on from is found in
`prepare.py`.
"""

import sys

# Run by its path, this file's folder comes first on sys.path and would hide packages named like our
# modules.
sys.path[:] = [p for p in sys.path if p != __file__.rsplit("/", 1)[0]]

import contextlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ds_cmli.common import hardware, provenance, quiet
from ds_cmli.common.cli import GroupedCommand, run_command, say
from ds_cmli.common.probe import probe
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.options import (
    OUTPUT,
    START,
    WHAT,
    add,
    resolve_config,
)
from ds_cmli.config.schema import Config
from ds_cmli.distributed.launchers import map_launcher_environment
from ds_cmli.faults import preemption
from ds_cmli.memory.profile import Profiles
from ds_cmli.prepare import LaunchOptions, Prepared, RankContext, check_early, load_data, prepare

if TYPE_CHECKING:  # it takes seconds to import, and options are checked before
    from ds_cmli.run import Run


@click.command(cls=GroupedCommand, context_settings={"help_option_names": ["-h", "--help"]})
@add(*WHAT, *OUTPUT, *START)
def command(deepspeed_config: str, settings: tuple[str, ...], **options: Any) -> int:
    """Train a student on image-text pairs with global contrastive, all-pairs CMLI and Target-CMLI
    losses.

    With no options it trains the preset "quick" to its end. On TERM, USR1, USR2, INT, QUIT or HUP
    it saves and ends with exit code 85; started again in the same way, it resumes.
    """
    map_launcher_environment()
    profiles = Profiles(options.pop("profile"), options.pop("profile_memory"))
    dry_run = options.pop("dry_run")
    start = LaunchOptions(options.pop("resume"), options.pop("resume_with_changes"), profiles)
    config = resolve_config(settings, options)
    where = config.run.output_dir or "a new folder in runs"
    say(f"ds-cmli {provenance.version()}: preset {config.run.preset}, to {where}")
    quiet.silence()
    ds_config = DeepSpeedConfig.load(deepspeed_config)
    if dry_run:
        check_early(config, ds_config, start)
        say(json.dumps({"config": config.to_dict(), "deepspeed": ds_config.raw()}, indent=2))
        return 0
    return train(config, ds_config, start).code


class Ended(NamedTuple):
    """A run that was started: its exit code, 0 at the end, and its folder.

    The code is `preemption.EXIT_CODE` where the run is to be started again.
    """

    code: int
    folder: Path


def train(config: Config, ds_config: DeepSpeedConfig, start: LaunchOptions) -> Ended:
    """Train: what the command and `ds_cmli.fit` call. Collective."""
    # --- configuration: on every rank, before the processes meet
    check_early(config, ds_config, start)
    if config.run.deterministic:
        hardware.enforce_determinism()
    data, mistake = load_data(config)
    import torch.distributed as dist

    from ds_cmli.distributed import process_group as distributed

    with quiet.without_trackers():
        from ds_cmli.checkpoint import run_folder
        from ds_cmli.engine import on_this_device
    from ds_cmli.faults.watchdog import Watchdog

    ds_config = on_this_device(ds_config)

    # --- processes
    theirs = dist.is_initialized()  # a group that the script has made stays
    device = distributed.init()  # collective
    alone = start.raises and os.environ["WORLD_SIZE"] == "1"  # a debugger may hold it for long
    with Watchdog(0.0 if alone else config.run.watchdog) as watchdog:
        try:
            distributed.raise_together(mistake)  # collective
            assert data is not None, "a mistake has been raised"
            folder = run_folder.make(config, start.resume)  # collective
            with run_folder.held(folder):  # collective
                place = RankContext(device, folder, watchdog)
                ready = prepare(config, ds_config, data, place, start)  # collective
                if ready is None:
                    return Ended(0, folder)
                return Ended(build_and_train(ready), folder)  # collectives
        finally:
            if not theirs:
                distributed.shutdown()


def build_and_train(ready: Prepared) -> int:
    """Build the engine, put back what there is to go on from, and train. Collective."""
    from ds_cmli.checkpoint import resume, run_folder
    from ds_cmli.checkpoint.save import Checkpoints
    from ds_cmli.engine import build, counts_line, release, with_backend
    from ds_cmli.memory import out_of_memory
    from ds_cmli.metrics import Meter, open_writer
    from ds_cmli.models.hf import write_config
    from ds_cmli.run import Run

    config, plan, data, state = ready.config, ready.plan, ready.data, ready.state
    device, folder, watchdog = ready.place.device, ready.place.folder, ready.place.watchdog
    chosen, notice = with_backend(config, plan.deepspeed, device)  # collective
    say(notice)
    raises, afterwards = ready.start.raises, contextlib.ExitStack()
    ending = out_of_memory.ending(folder, device, raises)
    with afterwards, ending as engines:
        engine = build(
            chosen,
            plan.deepspeed,
            data.tokenizer.vocab_size,
            plan.total_steps,
            device,
            data.tokenizer.special,
        )
        engines.append(engine)
        if raises:
            afterwards.callback(release, engine.engine)
        resume.load(ready.point, state, engine, ready.bad, ready.start.with_changes)  # collective
        student, words = engine.objective.student, data.tokenizer
        describe = partial(write_config, config=config, student=student, words=words)
        run_folder.settle(ready.point, folder, config, plan.deepspeed, describe)  # collective
        say(counts_line(engine.objective, engine.teacher))
        if ready.point is not None and ready.point.changed:
            rate, at = engine.engine.get_lr()[0] / engine.lr_factor, state.step + 1
            say(f"with changes: step {at} of {plan.total_steps} has a learning rate of {rate:.2e}")
        with watchdog.slow():  # a tracker may ask its server
            writer = open_writer(
                folder, plan.total_steps, state.step, config.run.report_to
            )  # collective
            parts = Run(
                ready=ready,
                engine=engine,
                checkpoints=Checkpoints(folder, engine, config.run, (state.step, state.evaluated)),
                writer=writer,
                meter=Meter(engine),
            )
        profiles = ready.start.profiles
        with (
            probe.subscribed(parts.meter),
            profiles.around(engine, chosen, plan.deepspeed, folder, state.step) as after_step,
            preemption.handled(),
        ):
            return loop(parts, after_step)  # collective


def loop(run: "Run", after_step: Callable[[], None]) -> int:
    """Train to the end; all ranks go through the same lines and meet in those marked.

    One step: for each micro-batch, features -> losses over the pairs of all ranks -> backward; then
    clip, update, EMA (`TrainEngine.step`). With optim.negatives = "global_batch" and several
    micro-batches: the features of all of them first, then the losses tile by tile, then each
    micro-batch again (`losses/gradient_cache.py`).

    Returns the exit code.
    """
    from ds_cmli.data.pairs import train_loader

    settings, state, data = run.config.run, run.state, run.config.data
    batches = iter(
        train_loader(run.data, run.sampler, data.workers, preemption.shield, data.prefetch)
    )
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
            micro_batches, by_the_clock = run.take_micro_batches(batches)  # collectives
            # Collectives: one optimizer step.
            losses = run.engine.step(micro_batches, run.sign_of_life)
            state.step += 1
            run.end_step(losses)  # collectives after a skipped step
            after_step()
            due = run.due()
            if due.log:
                run.log()  # collectives, CPU-GPU sync
            state.evaluated = not due.evaluation
            save_due = due.checkpoint or by_the_clock
    except preemption.Preempted:
        run.save_done()  # collectives
        signal = preemption.requested() or "a signal to another rank"
        run.writer.say(
            f"stopped at step {state.step} of {run.total_steps} by {signal}: start again with "
            f"--output-dir {run.checkpoints.folder} to go on"
        )
        run.writer.close()
        return preemption.EXIT_CODE

    run.writer.say(*run.bad.summary(run.flags))  # collective
    run.writer.close()
    run.writer.say(*run.checkpoints.closing_lines(state))
    return 0


def main() -> None:
    run_command(command, prints_results=False)


if __name__ == "__main__":
    main()
