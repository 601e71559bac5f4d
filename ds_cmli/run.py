"""The work of the training loop between its steps: loading data, logging, evaluating and saving.

All ranks call every method together.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ds_cmli.checkpoint.save import Checkpoints
from ds_cmli.checkpoint.state import TrainState
from ds_cmli.config.schema import Config
from ds_cmli.data.build import Data
from ds_cmli.data.pairs import BadSamples, Batch
from ds_cmli.data.sampler import GlobalBatchSampler
from ds_cmli.data.shard_cache import fetched_bytes
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import TrainEngine
from ds_cmli.engine.train_engine import MicroBatchLosses, name_means
from ds_cmli.errors import UserError
from ds_cmli.evaluate.embed import Evaluator
from ds_cmli.evaluate.match_map import match_maps
from ds_cmli.evaluate.retrieval import evaluate_split
from ds_cmli.evaluate.summary import Metrics, best_result, prefixed, summary
from ds_cmli.evaluate.zero_shot import ClassPictures, classify
from ds_cmli.faults import nonfinite, preemption
from ds_cmli.faults.watchdog import Watchdog
from ds_cmli.logs.meter import Meter
from ds_cmli.logs.writer import NullWriter, Writer

MAX_SKIPPED_IN_ROW = 5  # the run ends when more steps in a row are skipped


@dataclass
class Run:
    """A run in training: its data, its engine, and the state that a checkpoint holds."""

    config: Config
    data: Data
    class_pictures: dict[str, ClassPictures]  # the folders of run.zero_shot, by name
    sampler: GlobalBatchSampler  # the order of the training samples, and the position in it
    total_steps: int
    state: TrainState  # all that the next step depends on, besides the engine
    engine: TrainEngine
    checkpoints: Checkpoints
    writer: Writer | NullWriter  # a Writer on rank 0, a NullWriter on the other ranks
    meter: Meter
    bad_samples: BadSamples
    flags: distributed.CollectiveFlags  # decisions that all ranks take together
    watchdog: Watchdog
    stop_poll: distributed.SpacedFlag  # of signals during an evaluation

    def due(self, interval: int) -> bool:
        """Return True at the last step and at each multiple of `interval`; 0: only at the last."""
        step = self.state.step
        return step == self.total_steps or (interval > 0 and step % interval == 0)

    def take_micro_batches(self, batches: Iterator[Batch]) -> tuple[list[Batch], bool]:
        """Load the micro-batches of a step; also return whether a checkpoint is due by the clock.

        Raises `Preempted`, on all ranks, if a signal has arrived on any. Collectives.
        """
        self.watchdog.heartbeat(self.state.step)
        micro_batches: list[Batch] = []
        error: Exception | None = None
        try:
            for _ in range(self.engine.accumulation):
                with self.meter.timed("data"), self.watchdog.counting(fetched_bytes):
                    micro_batches.append(next(batches))
                self.watchdog.heartbeat()
        except Exception as loading_error:
            # Raised below on all ranks, because the others must not wait for this one.
            error = loading_error
        signalled = preemption.end_request() is not None
        save_due_here = self.checkpoints.due()  # by this rank's clock
        failed, stop, save_due = self.flags.any(
            error is not None, signalled, save_due_here
        )  # collective
        if failed:
            self.save_if_changed()  # collectives
            with distributed.raised_together(self.flags.group):  # collective
                if error is not None:
                    raise error
        if stop:
            raise preemption.Preempted
        # They are counted only now, because a loading error saves the state of the step before.
        for batch in micro_batches:
            self.bad_samples.add(batch.bad)
            self.meter.pairs += self.sampler.global_batch
            self.sampler.advance()
        return micro_batches, save_due

    def end_step(self, step_losses: list[MicroBatchLosses]) -> None:
        """Add the step's losses to the sums for the log, or count the step as skipped.

        All ranks skip a step if the loss or the gradients are not finite on any rank. Raises
        UserError after too many skipped steps in a row. Collectives after a skipped step.
        """
        state = self.state
        self.writer.advance()
        skipped_samples: list[int] = []
        if self.engine.skipped:
            index_and_loss = [(losses.index, losses.total) for losses in step_losses]
            optimizer = self.engine.engine.optimizer
            skipped_samples = nonfinite.skipped_samples(
                index_and_loss, optimizer, self.flags
            )  # collective
        else:
            state.skipped_in_row = 0
        if not skipped_samples:
            # An overflow that only lowers the loss scale names no sample; the losses are finite.
            for losses in step_losses:
                state.sums += losses.stacked()
            state.micro_batches += len(step_losses)
            return
        state.skipped_in_row += 1
        self.writer.print(nonfinite.skipped_line(state.step, skipped_samples))
        self.writer.log(state.step, {"skipped": skipped_samples})
        if state.skipped_in_row > MAX_SKIPPED_IN_ROW:
            # The weights are those from before the first of these steps.
            self.save()  # collectives
            reason = (
                f"{state.skipped_in_row} steps in a row were skipped, "
                f"more than {MAX_SKIPPED_IN_ROW}"
            )
            raise UserError(self.checkpoints.diverged(reason, state))

    def log(self) -> None:
        """Log the mean losses over all ranks and all steps since the last log line.

        Raises UserError, on all ranks, if too many samples are bad; the run is saved first.
        Collectives, CPU-GPU sync.
        """
        state = self.state
        micro_batch_pairs = self.sampler.global_batch  # of all ranks
        local_means = state.sums / max(1, state.micro_batches)
        summed_means = distributed.sum_over_ranks(local_means)  # collective
        means = (summed_means / distributed.world_size()).tolist()  # CPU-GPU sync
        pairs_so_far = state.step * self.engine.accumulation * micro_batch_pairs
        num_bad = distributed.sum_over_ranks(torch.tensor(self.bad_samples.count))  # collective
        if self.bad_samples.are_too_many(int(num_bad), pairs_so_far):
            self.save_if_changed()  # collectives
            self.bad_samples.check(self.flags, pairs_so_far)  # collective
        logged_pairs = state.micro_batches * micro_batch_pairs
        values = name_means(means, self.config.loss.weights, logged_pairs)
        values |= self.engine.log_columns()  # CPU-GPU sync; collective under ZeRO-3
        values |= self.meter.lap()
        self.writer.log(state.step, values)
        state.sums.zero_()
        state.micro_batches = 0

    def evaluate(self) -> None:
        """Evaluate every held-out split with the weights, and with their moving average if kept.

        The best step is decided by the results of the moving average if there is one, otherwise by
        those of the weights. On one rank, a UserError saves a checkpoint first. Raises `Preempted`,
        on all ranks, if a signal arrives. Collectives.
        """
        ema = self.engine.ema
        try:
            with self.meter.timed("paused"), self.watchdog.counting(fetched_bytes):
                self._evaluate_splits("", can_be_best=ema is None)  # collectives
                if ema is not None:
                    with ema.as_weights():  # collectives
                        self._evaluate_splits("_ema", can_be_best=True)  # collectives
        except UserError:
            # Other ranks may still be evaluating, and could not join the save.
            if distributed.world_size() == 1:
                self.save_if_changed()
            raise
        self.state.count_evaluation()

    def _evaluate_splits(self, suffix: str, can_be_best: bool) -> None:
        """Evaluate every held-out split with the current weights, and log the results. Collectives.

        `suffix`: added to each split's name in the log.
        """
        settings = self.config.run
        state = self.state
        model = Evaluator(  # collective
            self.engine.objective,
            self.data.tokenizer,
            self.engine.device,
            settings.eval_batch,
            workers=self.config.data.workers,
            heartbeat=self.poll,
            worker_init=preemption.block_signals,
        )
        # The name and the metrics of the first split of each task.
        first_results: dict[str, tuple[str, Metrics]] = {}
        for split, pairs in self.data.evals.items():
            name = split + suffix
            metrics, embedded = evaluate_split(model, pairs)  # collectives
            grid = model.student.grid
            maps = match_maps(embedded, model.tokenizer, grid, settings.match_maps)  # collective
            for number, picture in enumerate(maps):
                self.writer.picture(state.step, f"match-maps/{name}/{number}", picture)
            self.writer.log(state.step, prefixed(f"eval/{name}/", metrics))
            self.writer.print(summary(metrics, model.precision, name))
            first_results.setdefault("retrieval", (name, metrics))
        for folder, pictures in self.class_pictures.items():
            name = folder + suffix
            metrics = classify(model, pictures)  # collectives
            self.writer.log(state.step, prefixed(f"zero_shot/{name}/", metrics))
            self.writer.print(summary(metrics, model.precision, name))
            first_results.setdefault("zero_shot", (name, metrics))
        if can_be_best:
            name, metrics = first_results[settings.best_by]
            state.best = best_result(state.best, name, metrics, state.step)

    def poll(self) -> None:
        """Give a sign of life between two batches of an evaluation.

        Raises `Preempted`, on all ranks, if a signal has arrived. All ranks call it equally often;
        one call in so many seconds is collective.
        """
        self.watchdog.heartbeat()
        if self.stop_poll.any(preemption.end_request() is not None):  # at times collective
            raise preemption.Preempted

    def save_if_changed(self) -> None:
        """Save a checkpoint, unless the last one holds the current state. Collectives."""
        if not self.checkpoints.holds(self.state):
            self.save()  # collectives

    def save(self) -> None:
        """Save a checkpoint and print its line, or a warning if that fails. Collectives."""
        self.state.capture(self.sampler, self.bad_samples)  # CPU-GPU sync
        with self.meter.timed("paused"), self.watchdog.slow():
            line = self.checkpoints.save(self.state)  # collectives
            self.writer.print(line)
