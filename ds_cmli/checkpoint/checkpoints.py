"""Decides when the run's next checkpoint is due, and tells what its last one holds."""

import time
from pathlib import Path

from ds_cmli.checkpoint.contents import FOLDER, latest
from ds_cmli.checkpoint.save import BEST_WEIGHTS, Saved, save, save_student
from ds_cmli.checkpoint.train_state import TrainState
from ds_cmli.checkpoint.weights import AVERAGE, WEIGHTS
from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import RunConfig
from ds_cmli.engine import TrainEngine

WRITTEN = ("config.json", "metrics.jsonl", "tensorboard", FOLDER, WEIGHTS, AVERAGE, BEST_WEIGHTS)


class Checkpoints:
    """The checkpoints of the run in `folder`: when one is due, and which state the last holds."""

    def __init__(self, folder: Path, engine: TrainEngine, settings: RunConfig, state: TrainState):
        self.folder, self.engine, self.settings = folder, engine, settings
        self.saved, self.saved_at = self._mark(state), time.monotonic()
        self.error: str | None = None  # why the last one could not be written

    def due(self) -> bool:
        """Whether a checkpoint is due by this rank's clock."""
        return 0 < 60 * self.settings.save_minutes < time.monotonic() - self.saved_at

    def asked_for_by_the_evaluation(self, state: TrainState) -> bool:
        """Whether the last evaluation ends the run, or has found the best result, which is kept."""
        best = self.settings.keep_best and state.is_best
        return state.out_of_patience(self.settings.patience) or best

    def holds(self, state: TrainState) -> bool:
        """Whether `state` is that of the last checkpoint, or that of the start."""
        return self.saved == self._mark(state)

    def save(self, state: TrainState) -> Saved:
        """Save a checkpoint of `state`. Collective."""
        keep_best = self.settings.keep_best
        saved = save(self.folder, self.engine, state, self.settings.keep, keep_best)  # collectives
        self.error = saved.error
        if saved.error is None:
            self.saved = self._mark(state)
        self.saved_at = time.monotonic()
        return saved

    def diverged(self, what: str, state: TrainState) -> str:
        """The error message of a diverged run: its first bad step and the last good checkpoint."""
        first = state.step - max(0, state.skipped_in_row - 1)
        good = latest(self.folder / FOLDER)
        kept = "no checkpoint had been saved before"
        if good:
            kept = f"the last good checkpoint is {self.folder / FOLDER / good}"
        return (
            f"the run has diverged: {what}; the first bad step is {first}, {kept}. Look at the "
            f"samples that {self.folder / 'metrics.jsonl'} names, or start over with a lower --lr"
        )

    def closing_lines(self, state: TrainState) -> list[str]:
        """The lines to print at the end of a run. Collective.

        Raises:
            UserError: its last checkpoint is missing; the student's weights are there if there was
                room for them.
        """
        if not self.holds(state):
            kept = ""
            if save_student(self.folder, self.engine):  # collectives
                kept = f"; {self.folder / WEIGHTS} has the weights of step {state.step}"
            raise UserError(
                f"the last checkpoint could not be written ({self.error}){kept}: mend that, and "
                f"start {self.folder} again"
            )
        lines = []
        if state.out_of_patience(self.settings.patience):
            lines.append(
                f"ended at step {state.step}: {state.worse_in_row} evaluations in a row gave no "
                "better result"
            )
        best = state.best
        over = f" ({best['pairs']} pairs, chance {best['chance']:.3f})"
        lines.append(f"best {best['metric']} {best['value']:.3f} at step {best['step']}{over}")
        files = []
        for name in WRITTEN:
            if (self.folder / name).exists():
                files.append(name + "/" * (self.folder / name).is_dir())
        lines.append(f"written to {self.folder}: {', '.join(files)}")
        return lines

    @staticmethod
    def _mark(state: TrainState) -> tuple[int, bool]:
        return state.step, state.evaluated
