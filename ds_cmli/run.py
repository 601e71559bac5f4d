"""What the loop is made of: one optimizer step, a logged line, an evaluation, a checkpoint, an end by a signal."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ds_cmli.checkpoint import restore as resuming
from ds_cmli.checkpoint import save as checkpoint
from ds_cmli.checkpoint.train_state import RankState, TrainState
from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import Config
from ds_cmli.data import BadSamples, Batch, Data, GlobalBatchSampler
from ds_cmli.data.bad import told
from ds_cmli.distributed import process_group as distributed
from ds_cmli.distributed.collective_flags import Agreement
from ds_cmli.engine import Step
from ds_cmli.evaluate import evaluate, summary
from ds_cmli.faults import nonfinite as guard
from ds_cmli.faults import preemption
from ds_cmli.faults.watchdog import Watchdog
from ds_cmli.metrics import NullWriter, Writer, peak_memory_bytes


@dataclass
class Run:
    """A run from where it stands. All methods are collective."""

    config: Config
    data: Data
    sampler: GlobalBatchSampler
    trainer: Step
    total_steps: int
    accumulation: int
    folder: Path
    state: TrainState
    own: RankState
    bad: BadSamples
    writer: Writer | NullWriter
    dog: Watchdog
    agreement: Agreement = field(default_factory=Agreement)
    pairs: int = 0  # since the last logged step
    since: float = field(default_factory=time.monotonic)  # when these began, pauses left out
    paused: float = 0.0  # seconds that checkpoints took since the last logged step
    saved_at: float = field(default_factory=time.monotonic)

    def __post_init__(self):
        self.saved = (self.state.step, self.state.evaluated)

    def train_step(self, batches: Iterator[Batch]) -> bool:
        """One optimizer step; whether by the clock a checkpoint is due after it.

        Raises:
            Preempted: on every rank, before anything has been trained on, where a signal came.
            UserError: on every rank, where a batch cannot be had, or too many steps in a row had to be skipped.
        """
        state, own = self.state, self.own
        self.dog.beat(state.step)
        window = []
        sums = torch.zeros_like(own.sums)
        due = False
        for micro_batch in range(self.accumulation):
            batch, error = None, None
            try:
                batch = next(batches)
            except Exception as caught:  # one rank's data: the others must not wait for it in a collective
                error = caught
            self.dog.beat()
            limit = 60 * self.config.run.save_minutes
            failed, signalled, due = self.agreement.any(  # collective
                batch is None,
                preemption.requested() is not None,
                0 < limit < time.monotonic() - self.saved_at,
            )
            if failed:
                self.agreement.raise_together(error)  # collective
            assert batch is not None
            if signalled and micro_batch == 0:
                raise preemption.Preempted
            self.bad.add(batch.bad)
            total, each = self.trainer(batch)  # collectives
            self.sampler.advance()
            sums += torch.stack([total, *each.values(), self.trainer.ignored.to(total.device)])
            window.append((batch.index, total))
            self.pairs += len(batch.index) * distributed.world_size()
        state.step += 1
        self.writer.advance()

        samples: list[int] = []
        if self.trainer.skipped:
            lower_scale = guard.can_lower_scale(self.trainer.engine.optimizer)
            samples = guard.skipped_samples(window, lower_scale, self.agreement)  # collective
        if samples:
            self._count_skipped(samples)  # collectives
            return due
        if not self.trainer.skipped:
            state.skipped_in_row = 0
        own.sums += sums
        own.micro_batches += self.accumulation
        return due

    def _count_skipped(self, samples: list[int]) -> None:
        self.state.skipped_in_row += 1
        self.writer.say(guard.line(self.state.step, samples))
        self.writer.log(self.state.step, {"skipped": samples})
        most = self.config.run.most_skipped
        if self.state.skipped_in_row > most:
            self.save()  # collectives
            raise UserError(
                self._diverged(
                    f"{self.state.skipped_in_row} steps in a row were skipped, more than run.most_skipped = {most}"
                )
            )

    def _diverged(self, what: str) -> str:
        """The line a diverged run ends with: its first bad step, and what is left from before."""
        first = self.state.step - max(0, self.state.skipped_in_row - 1)
        root = self.folder / checkpoint.FOLDER
        good = checkpoint.latest(root)
        kept = f"the last good checkpoint is {root / good}" if good else "no checkpoint had been saved before"
        return (
            f"the run has diverged: {what}; the first bad step is {first}, {kept}. Look at the "
            f"samples that {self.folder / 'metrics.jsonl'} names, or start over with a lower --lr"
        )

    def logs(self) -> bool:
        """Whether the step that was taken last is one to be logged."""
        return self.state.step == self.total_steps or self.state.step % self.config.run.log_every == 0

    def log(self) -> None:
        """One line of means over all ranks and all steps since the last one."""
        own = self.own
        means = distributed.mean_over_ranks(own.sums / max(1, own.micro_batches)).tolist()  # collective, CPU-GPU sync
        self.stop_if_too_many_bad()  # collective
        names = ["loss", *(f"loss/{name}" for name in self.config.loss.weights)]
        losses = dict(zip(names, means[:-1], strict=True)) if own.micro_batches else {}  # else every step was skipped
        if own.micro_batches:
            losses["ignored_negatives"] = round(means[-1] * own.micro_batches * self.sampler.global_batch)
        values = {name: v for name, v in {**losses, **self.trainer.state()}.items() if math.isfinite(v)}
        speed = self.pairs / (time.monotonic() - self.since)
        times = {"pairs_per_s": round(speed, 1), "checkpoint_s": round(self.paused, 3)}
        self.writer.log(self.state.step, {**values, **times}, peak_memory_bytes=peak_memory_bytes())
        own.sums.zero_()
        own.micro_batches, self.pairs, self.paused, self.since = 0, 0, 0.0, time.monotonic()

    def stop_if_too_many_bad(self) -> None:
        """Raise on every rank together where broken samples exceed their allowed share."""
        every = self.agreement.gather((self.bad.count, self.bad.first))  # collective
        count = sum(n for n, _ in every)
        if self.bad.too_many(count, self.state.step * self.accumulation * self.sampler.global_batch):
            self.bad.first = [item for _, first in every for item in first]
            raise UserError(self.bad.message(count))

    def evaluate(self) -> None:
        """Every held-out split; raises `Preempted` on all ranks where a signal came."""
        started, state = time.monotonic(), self.state
        batch, device = self.config.run.eval_batch, self.trainer.device
        for split, dataset in self.data.evals.items():
            # Between two batches, of which all ranks have as many.
            found = evaluate(self.trainer.objective, dataset, self.data, batch, device, self.poll)
            self.writer.log(state.step, {f"eval/{split}/{name}": value for name, value in found.items()})
            self.writer.say(summary(split, found))
            score = next(s for s in ("combined", "cmli", "global") if f"{s}/i2t_r1" in found)
            metric, value = f"{split} {score} R@1", (found[f"{score}/i2t_r1"] + found[f"{score}/t2i_r1"]) / 2
            if state.best.get("metric", metric) == metric and value > state.best.get("value", -1.0):
                by_chance = (found["chance/i2t_r1"] + found["chance/t2i_r1"]) / 2
                over = {"pairs": found["pairs"], "chance": by_chance}
                state.best = {"metric": metric, "value": value, "step": state.step, **over}
        state.evaluated = True
        self.since += time.monotonic() - started

    def poll(self) -> None:
        """A sign of life; raises `Preempted` on all ranks where one has been signalled."""
        self.dog.beat()
        if self.agreement.any(preemption.requested() is not None)[0]:  # collective
            raise preemption.Preempted

    def save(self) -> None:
        """A checkpoint, or a line that says why there is none."""
        state = self.state
        self.writer.flush(to_disk=True)
        own = resuming.collect(state, self.own, self.sampler, self.bad)
        with self.dog.slow():
            saved = checkpoint.save(self.folder, self.trainer, state, own, self.config.run.keep)  # collectives
        if saved.not_finite:
            self.writer.close()
            raise UserError(self._diverged(f"{saved.error} is not finite, nothing was saved"))
        if saved.error is None:
            self.saved = (state.step, state.evaluated)
            self.writer.say(f"checkpoint {saved.name}: {saved.bytes / 1e6:.1f} MB in {saved.seconds:.2f} s")
        else:
            self.writer.say(f"warning: no checkpoint at step {state.step}, the one before stays: {saved.error}")
        self.writer.draw(state.step, checkpoint_s=saved.seconds)
        self.saved_at = time.monotonic()
        self.since += saved.seconds
        self.paused += saved.seconds

    def stop(self) -> None:
        """What a signal leads to: save what has not been saved, and tell how to go on."""
        if self.saved != (self.state.step, self.state.evaluated):
            self.save()
        by = preemption.requested() or "a signal to another rank"
        where = f"step {self.state.step} of {self.total_steps}"
        self.writer.say(f"stopped at {where} by {by}: start again with --output-dir {self.folder} to go on")
        self.writer.close()

    def finish(self) -> None:
        """The last lines of a run; raises `UserError` where its last checkpoint could not be written."""
        skipped = sum(self.agreement.gather(self.bad.count))  # collective
        if skipped or self.bad.at_load:
            first = ", ".join(told(self.bad.first))
            at_load = len(self.bad.at_load)
            self.writer.say(f"skipped {at_load} samples at load and {skipped} in training; the first: {first}")
        self.writer.close()
        if self.saved != (self.state.step, True):
            raise UserError(f"the last checkpoint could not be written: free some space and start {self.folder} again")
        best = self.state.best
        over = f" ({best['pairs']} pairs, chance {best['chance']:.3f})" if "pairs" in best else ""
        self.writer.say(f"best {best['metric']} {best['value']:.3f} at step {best['step']}{over}")
        parts = "config.json, metrics.jsonl, tensorboard/, checkpoint/, student.safetensors"
        self.writer.say(f"written to {self.folder}: {parts}")
