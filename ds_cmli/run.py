"""What the training loop does between its steps: taking data, logging, evaluating and saving.

All methods are called by all ranks together.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ds_cmli.checkpoint.save import Checkpoints
from ds_cmli.checkpoint.state import TrainState
from ds_cmli.common import UserError
from ds_cmli.config.schema import Config
from ds_cmli.data.build import Data
from ds_cmli.data.pairs import BadSamples, Batch
from ds_cmli.data.sampler import GlobalBatchSampler
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import TrainEngine
from ds_cmli.engine.train_engine import MicroBatchLosses, by_name
from ds_cmli.evaluate.embed import Evaluator
from ds_cmli.evaluate.match_map import match_maps
from ds_cmli.evaluate.metrics import best, prefixed, summary
from ds_cmli.evaluate.retrieval import evaluate_split
from ds_cmli.faults import nonfinite, preemption
from ds_cmli.faults.watchdog import Watchdog
from ds_cmli.metrics import Meter, NullWriter, Writer

MOST_SKIPPED = 5  # steps in a row that are skipped; a further one ends the run


@dataclass
class Run:
    """A run in training."""

    config: Config
    data: Data
    sampler: GlobalBatchSampler  # the order of the training set's samples, and the position in it
    total_steps: int
    state: TrainState  # what the next step depends on besides the engine
    engine: TrainEngine
    checkpoints: Checkpoints
    writer: Writer | NullWriter  # of rank 0, and of the others
    meter: Meter
    bad: BadSamples
    flags: distributed.CollectiveFlags  # what ranks decide together
    watchdog: Watchdog

    def due(self, every: int) -> bool:
        """Whether what comes every so many steps, 0: never, and after the last one, is due now."""
        step = self.state.step
        return step == self.total_steps or (every > 0 and step % every == 0)

    def take_micro_batches(self, batches: Iterator[Batch]) -> tuple[list[Batch], bool]:
        """The micro-batches of a step, and whether a checkpoint is due by the clock. Collectives.

        Raises `Preempted` on all ranks where a signal came before the first of them.
        """
        self.watchdog.heartbeat(self.state.step)
        micro_batches: list[Batch] = []
        save_due = False
        for _ in range(self.engine.accumulation):
            batch: Batch | None = None
            error: Exception | None = None
            try:
                with self.meter.timed("data"):
                    batch = next(batches)
            except UserError as caught:  # of a loading process: its traceback precedes its message
                line = str(caught).strip().splitlines()[-1]
                error = UserError(line.split("UserError: ", 1)[-1])
            except Exception as caught:  # the other ranks must not wait for this one
                error = caught
            self.watchdog.heartbeat()
            signalled = preemption.requested() is not None
            failed, stop, save_due = self.flags.any(
                batch is None, signalled, self.checkpoints.due()
            )  # collective
            if failed:
                self.save_done()  # collectives
                with distributed.raised_together(self.flags.group):  # collective
                    if error is not None:
                        raise error
            if stop and not micro_batches:
                raise preemption.Preempted
            assert batch is not None, "an error has been raised"
            micro_batches.append(batch)
        for batch in micro_batches:  # only now: where the data fails, the step before is saved
            self.bad.add(batch.bad)
            self.meter.pairs += self.sampler.global_batch
            self.sampler.advance()
        return micro_batches, save_due

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
            optimizer = self.engine.engine.optimizer
            samples = nonfinite.skipped_samples(window, optimizer, self.flags)  # collective
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
        if state.skipped_in_row > MOST_SKIPPED:
            self.save()  # collectives: with the weights from before the first of them
            count = f"{state.skipped_in_row} steps in a row were skipped"
            why = f"{count}, more than {MOST_SKIPPED}"
            raise UserError(self.checkpoints.diverged(why, state))

    def log(self) -> None:
        """Write means over all ranks and all steps since the last line.

        Collectives, CPU-GPU sync.
        """
        state, micro_batch = self.state, self.sampler.global_batch
        sums = state.sums / max(1, state.micro_batches)
        means = distributed.mean_over_ranks(sums).tolist()  # collective, CPU-GPU sync
        taken = state.step * self.engine.accumulation * micro_batch
        self.bad.check(self.flags, taken)  # collective
        values = by_name(means, self.config.loss.weights, state.micro_batches * micro_batch)
        values |= self.engine.state()  # CPU-GPU sync; collective under ZeRO-3
        values |= self.meter.lap()
        self.writer.log(state.step, values)
        state.sums.zero_()
        state.micro_batches = 0

    def evaluate(self) -> None:
        """Evaluate every held-out split, with the weights and with their average, if there is one.

        The results of the last of both count as the best or not. If it fails, what has been trained
        is saved first. Raises `Preempted` on all ranks where a signal came. Collectives.
        """
        ema = self.engine.ema
        try:
            with self.meter.timed("paused"):
                self._evaluate_splits("", counts=ema is None)  # collectives
                if ema is not None:
                    with ema.as_weights():  # collectives
                        self._evaluate_splits("_ema", counts=True)  # collectives
        except UserError:
            if distributed.world_size() == 1:  # other ranks would be in the midst of theirs
                self.save_done()
            raise
        self.state.count_evaluation()

    def _evaluate_splits(self, suffix: str, counts: bool) -> None:
        """Evaluate every held-out split with the present weights, and log it with this suffix.

        `counts`: whether the result can be the best of the run. Collectives.
        """
        settings, state, engine, writer = self.config.run, self.state, self.engine, self.writer
        model = Evaluator(  # collective
            engine.objective,
            self.data.tokenizer,
            engine.device,
            settings.eval_batch,
            workers=self.config.data.workers,
            heartbeat=self.poll,
            worker_init=preemption.shield,
        )
        for split, pairs in self.data.evals.items():
            name = split + suffix
            metrics, embedded = evaluate_split(model, pairs)  # collectives
            grid = model.student.grid
            maps = match_maps(embedded, model.tokenizer, grid, settings.match_maps)  # collective
            for number, picture in enumerate(maps):
                writer.picture(state.step, f"match-maps/{name}/{number}", picture)
            writer.log(state.step, prefixed(f"eval/{name}/", metrics))
            writer.say(summary(metrics, model.precision, name))
            if counts:
                state.best = best(state.best, name, metrics, state.step)

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
        self.state.capture(self.sampler, self.bad)  # CPU-GPU sync
        with self.meter.timed("paused"), self.watchdog.slow():
            self.writer.say(self.checkpoints.save(self.state))  # collectives
