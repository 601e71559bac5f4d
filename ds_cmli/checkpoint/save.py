"""Saves a run: writes a checkpoint beside the last one, then publishes it and what follows from it.

The order of publishing:

1. `checkpoint/stepN.writing` gets its `checksums.json`, and becomes `checkpoint/stepN`.
2. `checkpoint/latest` names it. Until then the previous checkpoint counts as the newest.
3. `model.safetensors` and `model.ema.safetensors` beside `checkpoint/` are replaced by those of the
   new checkpoint, `model.best.safetensors` if its evaluation is the best one.
4. Old checkpoints are removed.

`state.json` has the SHA-256 of the files of 3. After a kill between two of these steps, the next
start makes files with another SHA-256 again from the newest checkpoint (`checkpoint/start.py`).
Nothing is lost.
"""

import json
import os
import shlex
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ds_cmli.checkpoint import storage
from ds_cmli.checkpoint.model_files import publish_models, write_models
from ds_cmli.checkpoint.state import STATE, TrainState
from ds_cmli.checkpoint.storage import CHECKPOINTS, WRITING, CheckpointWriter
from ds_cmli.checkpoint.weights import write_weights
from ds_cmli.config.schema import Config, RunConfig
from ds_cmli.config.source import export_library
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import TrainEngine
from ds_cmli.errors import UserError
from ds_cmli.models.hf import AVERAGE, WEIGHTS


@dataclass
class Checkpoints:
    """The checkpoints of a run: when one is due, and which state the last one holds."""

    folder: Path
    engine: TrainEngine
    settings: RunConfig
    saved_position: tuple[int, bool]  # step and `evaluated`, of the last one or of the start
    saved_at: float = field(default_factory=time.monotonic)
    error: str | None = None  # why the last one could not be written
    # Name and SHA-256 of the weights that are not trained.
    frozen: dict[str, str | None] = field(default_factory=dict)

    def due(self) -> bool:
        """Return True if a checkpoint is due by this rank's clock."""
        return 0 < 60 * self.settings.save_minutes < time.monotonic() - self.saved_at

    def due_after_evaluation(self, state: TrainState) -> bool:
        """Return True if the last evaluation ends the run, or is the best one, which is kept."""
        keeps_best = self.settings.keep_best and state.is_best
        return keeps_best or state.out_of_patience(self.settings.patience)

    def holds(self, state: TrainState) -> bool:
        """Return True if `state` is that of the last checkpoint, or that of the start."""
        return self.saved_position == (state.step, state.evaluated)

    def save(self, state: TrainState) -> str:
        """Write and publish a checkpoint, and return the line that tells of it. Collective.

        If that fails on any rank, as on a full disk, the files published before are unchanged.
        """
        started = time.monotonic()
        root = self.folder / CHECKPOINTS
        name = f"step{state.step}"
        if distributed.is_main():
            with suppress(OSError):
                storage.remove_incomplete(self.folder)
            repetition = 0
            while (root / name).is_dir():
                repetition += 1
                name = f"step{state.step}.{repetition}"
        name = distributed.broadcast_object(name)  # collective
        writer = CheckpointWriter()
        self._write(writer, root / (name + WRITING), state)  # collectives
        digests = writer.gather()  # collective
        if distributed.is_main():
            writer.attempt(lambda: self._publish(name, state, digests | self.frozen))
            if writer.error is not None:
                with suppress(OSError):  # what cannot be written can often not be removed either
                    storage.remove_incomplete(self.folder)
        # Collective: no rank continues or ends before the checkpoint is published.
        self.error = distributed.broadcast_object(writer.error)
        self.saved_at = time.monotonic()
        if self.error is not None:
            has_older = storage.checkpoint_steps(root)
            remainder = "the one before stays" if has_older else "there is none before"
            return f"warning: no checkpoint at step {state.step}, {remainder}: {self.error}"
        self.saved_position = (state.step, state.evaluated)
        num_bytes = 0
        if distributed.is_main():
            num_bytes = sum(path.stat().st_size for path in (root / name).iterdir())
        seconds = self.saved_at - started
        return f"checkpoint {name}: {num_bytes / 1e6:.1f} MB in {seconds:.2f} s"

    def _write(self, writer: CheckpointWriter, checkpoint: Path, state: TrainState) -> None:
        """Write the files of a checkpoint into the folder `checkpoint`. Collective."""
        engine = self.engine.engine
        engine.checkpoint_engine = writer
        # DeepSpeed would copy its script that converts the weights into each checkpoint.
        engine._copy_recovery_script = lambda path: None
        writer.attempt(lambda: checkpoint.mkdir(parents=True, exist_ok=True))
        engine.save_checkpoint(  # collectives
            str(checkpoint.parent),
            tag=checkpoint.name,
            save_latest=False,
            exclude_frozen_parameters=True,
        )
        writer.save(state.rank_part(), checkpoint / f"rank-{distributed.rank()}.pt")  # CPU-GPU sync
        keeps_best = self.settings.keep_best and state.is_best
        state.models = write_models(  # collectives
            self.engine, self.folder, writer, keeps_best, checkpoint
        )
        if not distributed.is_main():
            return
        if state.is_best:
            state.best["sha256"] = state.models.get(AVERAGE, state.models[WEIGHTS])
        if self.engine.frozen and not self.frozen:
            path = checkpoint.with_name("frozen" + WRITING)
            writer.write(path, partial(write_weights, self.engine.frozen))
            if digest := writer.take_digest(path.name):
                name = f"frozen-{digest[:12]}.safetensors"
                writer.attempt(lambda: os.replace(path, path.with_name(name)))
                self.frozen = {f"../{name}": digest}
        text = json.dumps(state.shared_part(), indent=1)
        writer.write(checkpoint / STATE, lambda path: path.write_text(text))

    def _publish(self, name: str, state: TrainState, digests: dict[str, str | None]) -> None:
        """Publish the checkpoint that has been written, in the order of this file's first lines."""
        root = self.folder / CHECKPOINTS
        previous = storage.newest_first(root)
        unpublished = root / (name + WRITING)
        storage.publish(unpublished / storage.CHECKSUMS, json.dumps(digests, indent=1).encode())
        os.replace(unpublished, root / name)
        storage.sync_folder(root)
        storage.publish(root / storage.LATEST, name.encode())
        publish_models(self.folder)

        kept_checkpoints = {root / name, *previous[: self.settings.keep - 1]}
        steps = storage.checkpoint_steps(root)
        if self.settings.keep_best and not state.is_best:
            best_checkpoints = [path for path in previous if steps[path] == state.best.get("step")]
            kept_checkpoints |= {*best_checkpoints[:1]}
        # Checkpoints newer than the previous one are left from a resume of an older one.
        for path in steps.keys() - kept_checkpoints:
            shutil.rmtree(path, ignore_errors=True)

    def diverged(self, reason: str, state: TrainState) -> str:
        """Return the error message of a diverged run, with the last good checkpoint."""
        first_bad_step = state.step - max(0, state.skipped_in_row - 1)
        good = storage.newest_first(self.folder / CHECKPOINTS)
        advice = f"the last good checkpoint is {good[0]}" if good else "no checkpoint is before it"
        metrics = self.folder / storage.METRICS
        return (
            f"the run has diverged: {reason}; the first bad step is {first_bad_step}, {advice}. "
            f"Look at the samples that {metrics} names, or start over with a lower --lr"
        )

    def require_saved(self, state: TrainState) -> None:
        """Raise `UserError` if no checkpoint holds the state with which the run ends."""
        if not self.holds(state):
            problem = f"the last checkpoint could not be written ({self.error})"
            raise UserError(f"{problem}: mend that, and start {self.folder} again")

    def closing_lines(self, state: TrainState, config: Config) -> list[str]:
        """Return the last lines of a run. Raises `UserError` if its last state is not saved."""
        self.require_saved(state)
        best = state.best
        folder = shlex.quote(str(self.folder))
        library = export_library(config)
        option = f" --as {library}" if library else ""
        lines = [
            f"best {best['metric']} {best['value']:.3f} at step {best['step']} "
            f"({best.get('size', 'mean of both ways')}, chance {best['chance']:.3f})",
            f"written to {self.folder}",
            f"match maps: python -m ds_cmli.visualize {folder}",
            f"evaluate:   python -m ds_cmli.evaluate {folder}",
            f"export:     python -m ds_cmli.export {folder} FOLDER{option}",
        ]
        if state.out_of_patience(self.settings.patience):
            reason = f"{state.worse_in_row} evaluations in a row gave no better result"
            lines.insert(0, f"ended at step {state.step}: {reason}")
        return lines
