"""Train the student: `deepspeed ds_cmli/train.py --deepspeed_config ds_configs/zero2.json`

The same script starts under `deepspeed`, `torchrun`, `srun` and plain `python`. It reads top to bottom: configuration,
processes, what there is to go on from, the engine, and the loop.
"""

import sys

# Run by its path, this file's folder comes first on sys.path and would hide packages named like our modules.
sys.path[:] = [p for p in sys.path if p != __file__.rsplit("/", 1)[0]]

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from ds_cmli.common import cli, hardware, provenance, quiet
from ds_cmli.common.cli import GroupedCommand, run_command, say
from ds_cmli.common.errors import UserError
from ds_cmli.common.probe import probe
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.options import (
    OUTPUT,
    START,
    WHAT,
    add,
    resolve_config,
    tell_beside_json,
)
from ds_cmli.config.schema import Config
from ds_cmli.config.start_checks import check_early, check_outputs
from ds_cmli.distributed.launchers import map_launcher_environment
from ds_cmli.faults import preemption
from ds_cmli.memory.profiler import Profiles


@click.command(cls=GroupedCommand, context_settings={"help_option_names": ["-h", "--help"]})
@add(*WHAT, *OUTPUT, *START)
def command(preset: str, deepspeed_config: str, settings: tuple[str, ...], resume: str, resume_with_changes: bool,
            dry_run: bool, profile: str | None, profile_memory: int | None, **options: Any) -> int:  # fmt: skip
    """Train a student on image-text pairs with global contrastive, all-pairs CMLI and Target-CMLI losses.

    With no options it trains the preset "demo" to its end. On TERM, USR1, USR2, INT, QUIT or HUP it saves and ends
    with exit code 85; started again in the same way, it goes on.
    """
    map_launcher_environment()
    config = resolve_config(preset, settings, options)
    profiles = Profiles(profile, profile_memory)
    ds_config = DeepSpeedConfig.load(deepspeed_config)
    tell_beside_json(config, ds_config, int(os.environ["WORLD_SIZE"]), settings, options)
    return train(config, ds_config, dry_run, resume, resume_with_changes, profiles)


def train(
    config: Config,
    ds_config: DeepSpeedConfig,
    dry_run: bool,
    resume: str,
    with_changes: bool,
    profiles: Profiles,
) -> int:
    """Returns the exit code: 0 at the end of the run, `preemption.EXIT_CODE` where it is to be started again."""
    # --- configuration: on every rank, before the processes meet, and before imports that take seconds
    check_early(config, ds_config, resume, profiles)
    where = config.run.output_dir or "a new folder in runs"
    say(f"ds-cmli {provenance.version()}: preset {config.run.preset}, to {where}")
    quiet.silence()
    from ds_cmli.data import assets
    from ds_cmli.data.load import build_data
    from ds_cmli.distributed import process_group as distributed

    if config.run.deterministic:
        hardware.enforce_determinism()
    data, mistake = None, None
    try:
        if os.environ["RANK"] == "0":
            check_outputs(ds_config, config.run.report_to)
        assets.fetch(assets.used(config))
        data = build_data(config.data, config.run.seed)
        say(*data.summary, *data.notices)
    except UserError as error:
        if os.environ["WORLD_SIZE"] == "1":
            raise
        mistake = str(
            error
        )  # perhaps on this node alone, where nobody would hear of it: told once the ranks have met
    with quiet.without_trackers():
        from ds_cmli.checkpoint import lock, run_folder
        from ds_cmli.engine import cannot_compile, on_this_device
    from ds_cmli.faults.watchdog import Watchdog, hold_back_nccl

    ds_config = on_this_device(ds_config)

    # --- processes
    hold_back_nccl(config.run.watchdog)
    try:
        device = distributed.init(stop=preemption.stop)  # collective
    except preemption.Preempted:
        say(
            f"stopped before step 1 by {preemption.requested()}{preemption.to_go_on('start again')}"
        )
        return preemption.EXIT_CODE
    try:
        distributed.raise_together(mistake or cannot_compile(config, device))  # collective
        folder = run_folder.make(config, resume, dry_run)  # collective
        with Watchdog(config.run.watchdog) as watchdog, lock.held(folder):  # collective
            return run(
                config,
                ds_config,
                data,
                device,
                folder,
                dry_run,
                resume,
                with_changes,
                profiles,
                watchdog,
            )
    finally:
        distributed.shutdown()


@dataclass
class Run:
    """The parts of a run, as the loop below uses them."""

    config: Config
    data: Any  # data.Data
    sampler: Any  # data.GlobalBatchSampler: the order of the samples, and the position in it
    engine: Any  # engine.TrainEngine
    total_steps: int  # optimizer steps
    accumulation: int  # micro-batches of an optimizer step
    state: Any  # checkpoint.train_state.TrainState: what the next step depends on beside the engine
    bad: Any  # data.BadSamples
    checkpoints: Any  # checkpoint.checkpoints.Checkpoints
    writer: Any  # metrics.Writer on rank 0, else metrics.NullWriter
    flags: Any  # CollectiveFlags: what ranks decide together
    watchdog: Any  # Watchdog
    meter: Any  # metrics.Meter


def run(
    config: Config, ds_config: DeepSpeedConfig, data: Any, device: Any, folder: Path, dry_run: bool, resume: str,
    with_changes: bool, profiles: Profiles, watchdog: Any,
) -> int:  # fmt: skip
    """Build everything, put back what there is to go on from, and train. Collective."""
    from ds_cmli import rehearse
    from ds_cmli.checkpoint import restore, run_folder
    from ds_cmli.checkpoint.checkpoints import Checkpoints
    from ds_cmli.data.bad import BAD_FILE, BadFile, BadSamples
    from ds_cmli.distributed import process_group as distributed
    from ds_cmli.distributed.process_group import CollectiveFlags
    from ds_cmli.engine import build, counts_line, plan, with_backend
    from ds_cmli.memory import out_of_memory
    from ds_cmli.metrics import Meter, NullWriter, open_writer

    # --- what there is to go on from
    resume = distributed.broadcast_object(run_folder.requeued(resume, folder))  # collective
    point = restore.find(resume, folder)  # collective
    ds_config, sampler, total_steps = plan(config, restore.rebatch(point, ds_config), data.mixture)
    state = restore.state_of(point, config, ds_config, with_changes, say, data.fingerprint)
    if (state.step >= total_steps and state.evaluated) or state.out_of_patience(
        config.run.patience
    ):
        say(
            f"the run in {folder} is finished, {state.step} steps: give another --output-dir to start a new one"
        )
        return 0
    if point is not None:
        sampler.load_state_dict(state.sampler)
    profiles = profiles.left(total_steps, state.step, say)
    bad = BadSamples(config.data.max_bad_share, len(data.train), data.bad)
    if distributed.is_main() and not dry_run:
        bad.file = BadFile(folder / BAD_FILE, data.bad)

    def parts(engine: Any, writer: Any) -> Run:
        return Run(
            config, data, sampler, engine, total_steps, ds_config.accumulation, state, bad,
            Checkpoints(folder, engine, config.run, state), writer, CollectiveFlags(), watchdog, Meter(engine),
        )  # fmt: skip

    if dry_run:
        start = {"resume": resume, "profile": profiles.trace, "profile_memory": profiles.memory}
        tried = parts(None, NullWriter())
        return rehearse.rehearse(
            tried, ds_config, device, start, partial(next_batch, tried)
        )  # collectives

    # --- engine
    here, notice = with_backend(config, device)
    say(notice)
    with out_of_memory.ending(here, ds_config, folder, device, watchdog):  # collective
        engine = build(here, ds_config, data.vocab_size, total_steps, device, data.special)
        restore.load(point, state, engine, bad, with_changes)  # collective
        run_folder.settle(resume, point, folder, config, ds_config)  # collective
        say(counts_line(engine.objective, engine.teacher))
        with watchdog.slow(together=True):  # a tracker may ask its server
            ready = parts(
                engine, open_writer(folder, total_steps, state.step, config.run.report_to)
            )  # collective
        with (
            probe.subscribed(ready.meter),
            profiles.around(engine, here, ds_config, folder, state.step) as after_step,
        ):
            return loop(ready, after_step)  # collective


def loop(run: Run, after_step: Callable[[], None]) -> int:
    """Train to the end; all ranks go through the same lines and meet in those marked. Returns the exit code."""
    from ds_cmli.data.loaders import train_loader
    from ds_cmli.distributed.process_group import world_size

    settings, state, engine = run.config.run, run.state, run.engine
    workers, prefetch = run.config.data.workers, run.config.data.prefetch
    batches = iter(train_loader(run.data, run.sampler, workers, preemption.shield, prefetch))
    run.bad.gather(
        run.flags
    )  # collective: what was left out at load is in its file from the beginning
    save_due = state.step == run.total_steps  # the run was stopped in its last evaluation
    try:
        while True:
            # The evaluation of a step comes before its checkpoint, which holds the result.
            if not state.evaluated:
                try:
                    evaluate(run)  # collectives
                except UserError:
                    if world_size() == 1:  # other ranks would be in the midst of theirs
                        save_done(run)
                    raise
                save_due = save_due or run.checkpoints.asked_for_by_the_evaluation(state)
            if save_due:
                save(run)  # collectives
            if state.step == run.total_steps or state.out_of_patience(settings.patience):
                break

            run.watchdog.heartbeat(state.step)
            micro_batches: list[Any] = []
            for _ in range(run.accumulation):
                batch, stop, save_due = next_batch(run, batches)  # collective
                if stop and not micro_batches:
                    raise preemption.Preempted
                micro_batches.append(batch)
            for (
                batch
            ) in micro_batches:  # only now: what is saved where the data fails is the step before
                run.bad.add(batch.bad)
                run.meter.pairs += run.sampler.global_batch
                run.sampler.advance()
            found = engine.step(
                micro_batches, run.watchdog.heartbeat
            )  # collectives: one optimizer step
            state.step += 1
            end_step(run, found)  # collectives after a skipped step
            after_step()

            last = state.step == run.total_steps
            if last or state.step % settings.log_every == 0:
                log(run)  # collectives, CPU-GPU sync
            state.evaluated = not (
                last or (settings.eval_every and state.step % settings.eval_every == 0)
            )
            save_due = (
                save_due
                or last
                or bool(settings.save_every and state.step % settings.save_every == 0)
            )
    except preemption.Preempted:
        save_done(run)  # collectives
        where = f"step {state.step} of {run.total_steps} by {preemption.requested() or 'a signal to another rank'}"
        again = f"start again with --output-dir {run.checkpoints.folder}"
        run.writer.say(f"stopped at {where}{preemption.to_go_on(again)}")
        run.writer.close()
        return preemption.EXIT_CODE

    run.writer.say(*run.bad.summary(run.flags))  # collective
    run.writer.close()
    if run.checkpoints.error is None and not run.checkpoints.holds(
        state
    ):  # collective: it has been removed meanwhile
        save(run)  # collectives
    run.writer.say(*run.checkpoints.closing_lines(state))  # collective
    return 0


def next_batch(run: Run, batches: Iterator[Any]) -> tuple[Any, bool, bool]:
    """The next micro-batch; whether a rank has been signalled; whether a checkpoint is due by the clock. Collective."""
    batch, error = None, None
    run.meter.timer.mark("data")
    try:
        batch = run.sampler.checked(next(batches))
    except Exception as caught:  # one rank's data: the others must not wait for it in a collective
        error = caught
    run.watchdog.heartbeat()
    signalled = preemption.requested() is not None
    failed, stop, save_due = run.flags.any(
        batch is None, signalled, run.checkpoints.due()
    )  # collective
    if failed:
        save_done(run)  # collectives
        run.flags.fail_together(error)  # collective
    assert batch is not None
    return batch, stop, save_due


def end_step(run: Run, found: list[Any]) -> None:
    """Count the step's losses or, where loss or gradients were not finite on some rank, the step as skipped on all."""
    from ds_cmli.faults import nonfinite

    state = run.state
    run.writer.advance()
    samples = nonfinite.samples_of(run.engine, found, run.flags)  # collective after a skipped step
    if not run.engine.skipped:
        state.skipped_in_row = 0
    if not samples:  # an overflow that only asked for a lower loss scale has finite losses
        for losses in found:
            state.sums += losses.stacked()
        state.micro_batches += run.accumulation
        return
    state.skipped_in_row += 1
    run.writer.say(nonfinite.line(state.step, samples))
    run.writer.log(state.step, {"skipped": samples})
    if state.skipped_in_row > (most := run.config.run.most_skipped):
        save(run)  # collectives: with the weights from before the first of them
        why = f"{state.skipped_in_row} steps in a row were skipped, more than run.most_skipped = {most}"
        raise UserError(run.checkpoints.diverged(why, state))


def log(run: Run) -> None:
    """One line of means over all ranks and all steps since the last one. Collectives, CPU-GPU sync."""
    from ds_cmli.distributed.process_group import mean_over_ranks
    from ds_cmli.engine.result import by_name
    from ds_cmli.metrics import peak_memory_bytes

    state = run.state
    means = mean_over_ranks(
        state.sums / max(1, state.micro_batches)
    ).tolist()  # collective, CPU-GPU sync
    run.bad.check(run.flags, state.step * run.accumulation * run.sampler.global_batch)  # collective
    values = by_name(means, run.config.loss.weights, state.micro_batches * run.sampler.global_batch)
    values |= run.engine.state()  # CPU-GPU sync; collective under ZeRO-3
    run.writer.log(state.step, {**values, **run.meter.lap()}, peak_memory_bytes=peak_memory_bytes())
    run.writer.say(*run.checkpoints.missing())
    state.sums.zero_()
    state.micro_batches = 0


def evaluate(run: Run) -> None:
    """Every held-out split, with the weights and with their average, whose result then counts as the best or not.

    Raises `Preempted` on all ranks where a signal came. Collectives.
    """
    from ds_cmli.evaluate import report
    from ds_cmli.evaluate.embed import EmbedSettings, Share
    from ds_cmli.evaluate.match_maps import draw
    from ds_cmli.evaluate.split import evaluate_split

    settings, state, ema = run.config.run, run.state, run.engine.ema
    workers = run.config.data.workers
    how = EmbedSettings(
        settings.eval_batch, run.engine.device, workers, lambda: poll(run), preemption.shield
    )
    passes = [("", nullcontext)] if ema is None else [("", nullcontext), ("_ema", ema.as_weights)]
    with run.meter.paused():
        for suffix, weights in passes:
            with weights():  # collectives
                for split, dataset in run.data.evals.items():
                    name = split + suffix

                    def show(share: Share, name: str = name) -> None:
                        run.bad.evaluated(share.left_out)
                        maps, tokenizer = settings.match_maps, run.data.tokenizer
                        draw(run.writer, state.step, name, maps, tokenizer, share)  # collective

                    measured = evaluate_split(
                        run.engine.objective, dataset, run.data, how, show=show
                    )  # collectives
                    run.writer.log(
                        state.step,
                        {f"eval/{name}/{metric}": value for metric, value in measured.items()},
                    )
                    run.writer.say(report.summary(name, measured))
                    if suffix == passes[-1][0]:
                        state.best = report.best(state.best, name, measured, state.step)
    state.count_evaluation()


def poll(run: Run) -> None:
    """A sign of life between two batches of an evaluation; raises `Preempted` on all ranks together. Collective."""
    run.watchdog.heartbeat()
    if run.flags.any(preemption.requested() is not None)[0]:  # collective
        raise preemption.Preempted


def save_done(run: Run) -> None:
    """A checkpoint of what has been trained, unless the last one holds it. Collectives."""
    if not run.checkpoints.holds(run.state):  # collective
        save(run)  # collectives


def save(run: Run) -> None:
    """A checkpoint, or a line that says why there is none. Collectives."""
    run.writer.flush(to_disk=True)
    run.writer.say(*run.checkpoints.missing())
    run.bad.gather(run.flags)  # collective
    run.state.capture(run.sampler, run.bad)  # CPU-GPU sync
    run.state.metrics_lines = run.writer.lines_at(run.state.step, run.state.evaluated)
    with run.watchdog.slow(together=True):
        saved = run.checkpoints.save(run.state)  # collectives
    if saved.not_finite:
        run.writer.close()
        raise UserError(
            run.checkpoints.diverged(f"{saved.error} is not finite, nothing was saved", run.state)
        )
    run.writer.say(saved.line(run.state.step))
    run.writer.draw(run.state.step, checkpoint_s=saved.seconds)
    run.meter.pause(saved.seconds, checkpoint=True)


def main() -> None:
    cli.guard_streams()
    preemption.install()
    run_command(command, prints_results=False)


if __name__ == "__main__":
    main()
