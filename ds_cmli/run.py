"""The parts of a run, and what the training loop does with them between its steps.

That is taking data, logging, evaluating and saving. All methods are called by all ranks together.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ds_cmli.checkpoint.save import Checkpoints
from ds_cmli.common.errors import UserError
from ds_cmli.data.batch import Batch
from ds_cmli.distributed.process_group import mean_over_ranks, world_size
from ds_cmli.engine import TrainEngine
from ds_cmli.engine.train_engine import MicroBatchLosses, by_name
from ds_cmli.evaluate import report
from ds_cmli.evaluate.embed import Evaluator
from ds_cmli.evaluate.match_map import match_maps
from ds_cmli.evaluate.retrieval import evaluate_split
from ds_cmli.faults import nonfinite, preemption
from ds_cmli.metrics import Meter, NullWriter, Writer, peak_memory_bytes
from ds_cmli.prepare import Prepared, next_batch


class Due(NamedTuple):
    log: bool
    evaluation: bool
    checkpoint: bool  # by the number of steps; also by the clock and after an evaluation


@dataclass
class Run:
    """The parts of a run, as `train.loop` uses them."""

    ready: Prepared
    engine: TrainEngine
    checkpoints: Checkpoints
    writer: Writer | NullWriter  # of rank 0, and of the others
    meter: Meter

    def __post_init__(self) -> None:
        self.config, self.data, self.state = self.ready.config, self.ready.data, self.ready.state
        self.total_steps = self.ready.plan.total_steps  # optimizer steps
        self.sampler = self.ready.plan.sampler  # the order of the samples, and the position in it
        self.bad, self.flags = self.ready.bad, self.ready.flags
        self.watchdog = self.ready.place.watchdog

    def take_micro_batches(self, batches: Iterator[Batch]) -> tuple[list[Batch], bool]:
        """The micro-batches of a step, and whether a checkpoint is due by the clock. Collectives.

        Raises `Preempted` on all ranks where a signal came before the first of them.
        """
        self.watchdog.heartbeat(self.state.step)
        micro_batches: list[Batch] = []
        save_due = False
        for _ in range(self.ready.plan.deepspeed.accumulation):
            self.meter.timer.mark("data")
            batch, stop, save_due = next_batch(
                self.ready, batches, self.checkpoints.due, self.save_done
            )  # collective
            if stop and not micro_batches:
                raise preemption.Preempted
            micro_batches.append(batch)
        for batch in micro_batches:  # only now: where the data fails, the step before is saved
            self.bad.add(batch.bad)
            self.meter.pairs += self.sampler.global_batch
            self.sampler.advance()
        return micro_batches, save_due

    def sign_of_life(self) -> None:
        """Tell the watchdog, and whoever reads the log of a long step."""
        self.watchdog.heartbeat()
        self.writer.say_alive(self.state.step + 1, self.meter.timer.so_far)

    def end_step(self, step_losses: list[MicroBatchLosses]) -> None:
        """Count the step's losses, or the step as skipped on all ranks.

        It is skipped where loss or gradients were not finite on some rank. Collectives after a
        skipped step.
        """
        state = self.state
        self.writer.advance()
        samples: list[int] = []
        if self.engine.skipped:
            window = [(losses.index, losses.total) for losses in step_losses]
            can_lower = nonfinite.can_lower_scale(self.engine.engine.optimizer)
            samples = nonfinite.skipped_samples(window, can_lower, self.flags)  # collective
        else:
            state.skipped_in_row = 0
        if not samples:  # an overflow that only asked for a lower loss scale has finite losses
            for losses in step_losses:
                state.sums += losses.stacked()
            state.micro_batches += len(step_losses)
            return
        state.skipped_in_row += 1
        self.writer.say(nonfinite.line(state.step, samples))
        self.writer.log(state.step, {"skipped": samples})
        if state.skipped_in_row > (most := self.config.run.most_skipped):
            self.save()  # collectives: with the weights from before the first of them
            why = (
                f"{state.skipped_in_row} steps in a row were skipped, "
                f"more than run.most_skipped = {most}"
            )
            raise UserError(self.checkpoints.diverged(why, state))

    def due(self) -> Due:
        """What is due after the step that has just been taken."""
        settings, step = self.config.run, self.state.step
        if step == self.total_steps:
            return Due(True, True, True)

        def every(steps: int) -> bool:
            return steps > 0 and step % steps == 0

        return Due(
            every(settings.log_every), every(settings.eval_every), every(settings.save_every)
        )

    def log(self) -> None:
        """Write means over all ranks and all steps since the last line.

        Collectives, CPU-GPU sync.
        """
        state, micro_batch = self.state, self.sampler.global_batch
        sums = state.sums / max(1, state.micro_batches)
        means = mean_over_ranks(sums).tolist()  # collective, CPU-GPU sync
        accumulation = self.ready.plan.deepspeed.accumulation
        self.bad.check(self.flags, state.step * accumulation * micro_batch)  # collective
        values = by_name(means, self.config.loss.weights, state.micro_batches * micro_batch)
        values |= self.engine.state()  # CPU-GPU sync; collective under ZeRO-3
        values |= self.meter.lap()  # CPU-GPU sync
        self.writer.log(state.step, values, peak_memory_bytes=peak_memory_bytes())
        state.sums.zero_()
        state.micro_batches = 0

    def evaluate(self) -> None:
        """Evaluate all held-out splits; if that fails, first save what has been trained.

        Raises `Preempted` on all ranks where a signal came. Collectives.
        """
        try:
            self._evaluate()  # collectives
        except UserError:
            if world_size() == 1:  # other ranks would be in the midst of theirs
                self.save_done()
            raise

    def _evaluate(self) -> None:
        """Evaluate every held-out split, with the weights and with their average, if there is one.

        The results of the last of both count as the best or not. Collectives.
        """
        ema = self.engine.ema
        with self.meter.paused():
            self._evaluate_splits("", counts=ema is None)  # collectives
            if ema is not None:
                with ema.as_weights():  # collectives
                    self._evaluate_splits("_ema", counts=True)  # collectives
        self.state.count_evaluation()

    def _evaluate_splits(self, suffix: str, counts: bool) -> None:
        """Evaluate every held-out split with the present weights, and log it with this suffix.

        `counts`: whether the result can be the best of the run. Collectives.
        """
        settings, state, engine = self.config.run, self.state, self.engine
        how = settings.eval_batch, self.config.data.workers, self.poll, preemption.shield
        # Collective under ZeRO-3.
        model = Evaluator(engine.objective, self.data.tokenizer, engine.device, *how)
        for split, pairs in self.data.evals.items():
            name = split + suffix
            metrics, embedded = evaluate_split(model, pairs)  # collectives
            grid = model.student.grid
            maps = match_maps(embedded, model.tokenizer, grid, settings.match_maps)  # collective
            for number, picture in enumerate(maps):
                self.writer.picture(state.step, f"match-maps/{name}/{number}", picture)
            self.writer.log(state.step, report.prefixed(f"eval/{name}/", metrics))
            self.writer.say(report.summary(metrics, model.precision, name))
            if counts:
                state.best = report.best(state.best, name, metrics, state.step)

    def poll(self) -> None:
        """Give a sign of life between two batches of an evaluation.

        Raises `Preempted` on all ranks together. Collective.
        """
        self.watchdog.heartbeat()
        if self.flags.any(preemption.requested() is not None)[0]:  # collective
            raise preemption.Preempted

    def save_done(self) -> None:
        """Save a checkpoint of what has been trained, unless the last one holds it. Collectives."""
        if not self.checkpoints.holds(self.state):
            self.save()  # collectives

    def save(self) -> None:
        """Save a checkpoint, or print a line that says why there is none. Collectives."""
        self.writer.flush()
        self.state.capture(self.sampler, self.bad)  # CPU-GPU sync
        with self.watchdog.slow():
            line, seconds = self.checkpoints.save(self.state)  # collectives
        self.writer.say(line)
        self.writer.draw(self.state.step, checkpoint_s=seconds)
        self.meter.pause(seconds, checkpoint=True)
