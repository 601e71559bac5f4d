"""Saves a run: writes a checkpoint beside the last one, then publishes it and what follows from it.

The order of publishing:

1. `checkpoint/stepN.writing` gets its `checksums.json`, and becomes `checkpoint/stepN`.
2. `checkpoint/latest` names it. Before this rename the checkpoint before is the newest one.
3. `model.safetensors` and `model.ema.safetensors` beside `checkpoint/` are replaced by those of the
   new checkpoint, `model.best.safetensors` if its evaluation is the best one.
4. Old checkpoints are removed.

`state.json` has the SHA-256 of the files of 3. A start makes the files anew from the newest
checkpoint if they are others (`checkpoint/start.py`), so a kill between two of these steps loses
nothing. transformers loads the files with those that `models/hf.py` writes.
"""

import json
import os
import shutil
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ds_cmli.checkpoint.state import STATE, TrainState
from ds_cmli.checkpoint.storage import (
    CHECKPOINTS,
    CHECKSUMS,
    LATEST,
    METRICS,
    WRITING,
    CheckpointWriter,
    checkpoint_steps,
    newest_first,
    publish,
    remove_incomplete,
    save_tensors,
    sync_folder,
)
from ds_cmli.checkpoint.weights import collect_weights, write_weights
from ds_cmli.config.schema import RunConfig
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import TrainEngine
from ds_cmli.errors import UserError
from ds_cmli.models.adapters import merge_adapters
from ds_cmli.models.hf import AVERAGE, BEST, WEIGHTS

DISTILLATION_HEAD = "width_head."  # the head to the teacher's width, which is not the student's


@dataclass
class Checkpoints:
    """The checkpoints of a run: when one is due, and which state the last one holds."""

    folder: Path
    engine: TrainEngine
    settings: RunConfig
    saved: tuple[int, bool]  # step and whether it was evaluated, of the last one or of the start
    saved_at: float = field(default_factory=time.monotonic)
    error: str | None = None  # why the last one could not be written
    frozen: dict[str, str] = field(default_factory=dict)  # name and SHA-256 of the frozen weights

    def due(self) -> bool:
        """Return True if a checkpoint is due by this rank's clock."""
        return 0 < 60 * self.settings.save_minutes < time.monotonic() - self.saved_at

    def due_after_evaluation(self, state: TrainState) -> bool:
        """Return True if the last evaluation ends the run, or is the best one, which is kept."""
        keeps_best = self.settings.keep_best and state.is_best
        return keeps_best or state.out_of_patience(self.settings.patience)

    def holds(self, state: TrainState) -> bool:
        """Return True if `state` is that of the last checkpoint, or that of the start."""
        return self.saved == (state.step, state.evaluated)

    def save(self, state: TrainState) -> str:
        """Write and publish a checkpoint, and return the line that tells of it. Collective.

        If that fails on any rank, as on a full disk, the files published before are unchanged.
        """
        started = time.monotonic()
        root = self.folder / CHECKPOINTS
        name = f"step{state.step}"
        if distributed.is_main():
            with suppress(OSError):
                remove_incomplete(self.folder)
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
                    remove_incomplete(self.folder)
        # Collective: no rank continues or ends before the checkpoint is published.
        self.error = distributed.broadcast_object(writer.error)
        self.saved_at = time.monotonic()
        if self.error is not None:
            kept = "the one before stays" if checkpoint_steps(root) else "there is none before"
            return f"warning: no checkpoint at step {state.step}, {kept}: {self.error}"
        self.saved = (state.step, state.evaluated)
        num_bytes = 0
        if distributed.is_main():
            num_bytes = sum(path.stat().st_size for path in (root / name).iterdir())
        seconds = self.saved_at - started
        return f"checkpoint {name}: {num_bytes / 1e6:.1f} MB in {seconds:.2f} s"

    def _write(self, writer: CheckpointWriter, checkpoint: Path, state: TrainState) -> None:
        """Write DeepSpeed's files, the student's, and the state's. Collective."""
        engine = self.engine.engine
        engine.checkpoint_engine = writer
        # DeepSpeed would copy a script into each checkpoint that writes the weights.
        engine._copy_recovery_script = lambda path: None
        writer.attempt(lambda: checkpoint.mkdir(parents=True, exist_ok=True))
        engine.save_checkpoint(  # collectives
            str(checkpoint.parent),
            tag=checkpoint.name,
            save_latest=False,
            exclude_frozen_parameters=True,
        )
        # CPU-GPU sync.
        writer.write(
            checkpoint / f"rank-{distributed.rank()}.pt", partial(save_tensors, state.of_rank())
        )
        state.models = write_models(self.engine, self.folder, writer, checkpoint)  # collectives
        if not distributed.is_main():
            return
        if state.is_best:
            state.best["sha256"] = state.models[name_of_evaluated(self.engine)]
            if self.settings.keep_best:
                write_best(self.engine, self.folder, writer)
        if self.engine.frozen and not self.frozen:
            path = checkpoint.with_name("frozen" + WRITING)
            writer.write(path, partial(write_weights, self.engine.frozen))
            if digest := writer.take_digest(path.name):
                name = f"frozen-{digest[:12]}.safetensors"
                writer.attempt(lambda: os.replace(path, path.with_name(name)))
                self.frozen = {f"../{name}": digest}
        text = json.dumps(state.shared(), indent=1)
        writer.write(checkpoint / STATE, lambda path: path.write_text(text))

    def _publish(self, name: str, state: TrainState, digests: dict[str, str]) -> None:
        """Publish the checkpoint that has been written, in the order of this file's first lines."""
        root = self.folder / CHECKPOINTS
        previous = newest_first(root)
        unpublished = root / (name + WRITING)
        publish(unpublished / CHECKSUMS, json.dumps(digests, indent=1).encode())
        os.replace(unpublished, root / name)
        sync_folder(root)
        publish(root / LATEST, name.encode())
        publish_models(self.folder)

        kept = {root / name, *previous[: self.settings.keep - 1]}
        steps = checkpoint_steps(root)
        if self.settings.keep_best and not state.is_best:
            best_checkpoints = [path for path in previous if steps[path] == state.best.get("step")]
            kept |= {*best_checkpoints[:1]}
        # Checkpoints newer than the previous one are left from a resume of an older one.
        for path in steps.keys() - kept:
            shutil.rmtree(path, ignore_errors=True)

    def diverged(self, reason: str, state: TrainState) -> str:
        """Return the error message of a diverged run, with the last good checkpoint."""
        first_bad_step = state.step - max(0, state.skipped_in_row - 1)
        good = newest_first(self.folder / CHECKPOINTS)
        kept = f"the last good checkpoint is {good[0]}" if good else "no checkpoint is before it"
        return (
            f"the run has diverged: {reason}; the first bad step is {first_bad_step}, {kept}. Look "
            f"at the samples that {self.folder / METRICS} names, or start over with a lower --lr"
        )

    def closing_lines(self, state: TrainState) -> list[str]:
        """Return the last lines of a run. Raises `UserError` if there is no checkpoint of it."""
        if not self.holds(state):
            raise UserError(
                f"the last checkpoint could not be written ({self.error}): mend that, and start "
                f"{self.folder} again"
            )
        lines = []
        if state.out_of_patience(self.settings.patience):
            lines.append(
                f"ended at step {state.step}: {state.worse_in_row} evaluations in a row gave no "
                "better result"
            )
        best = state.best
        lines.append(
            f"best {best['metric']} {best['value']:.3f} at step {best['step']} "
            f"({best.get('size', 'mean of both ways')}, chance {best['chance']:.3f})"
        )
        return [
            *lines,
            f"written to {self.folder}",
            f"match maps: python -m ds_cmli.visualize {self.folder}",
            f"evaluate:   python -m ds_cmli.evaluate {self.folder}",
            f"export:     python -m ds_cmli.export {self.folder} FOLDER",
        ]


# --- the files beside `checkpoint/`


def name_of_evaluated(engine: TrainEngine) -> str:
    """Return the name of the weights whose evaluation counts: the averages if there are any."""
    return WEIGHTS if engine.ema is None else AVERAGE


def write_models(
    engine: TrainEngine, folder: Path, writer: CheckpointWriter, checkpoint: Path | None = None
) -> dict[str, str | None]:
    """Write the student and its averages, still to be published by `publish_models`. Collective.

    Args:
        checkpoint: gets the averages as the engine has them, without those of frozen weights.

    Returns:
        The names of the files and their SHA-256, None after an error; on rank 0 alone.
    """
    written: list[str] = []
    scale = engine.objective.student.lora_scale
    # One after the other, so that one of them is on the host at a time.
    for name in (WEIGHTS, AVERAGE):
        weights_of_name: AbstractContextManager[object] = nullcontext()
        if name == AVERAGE:
            if engine.ema is None:
                continue
            weights_of_name = engine.ema.as_master_weights()
        with weights_of_name:
            weights = collect_weights(engine)  # collectives
            if not distributed.is_main():
                continue
            student = {
                parameter: value
                for parameter, value in weights.items()
                if not parameter.startswith(DISTILLATION_HEAD)
            }
            writer.write(
                folder / (name + WRITING), partial(write_weights, merge_adapters(student, scale))
            )
            written.append(name)
            if name == AVERAGE and checkpoint is not None:
                trained = {key: value for key, value in weights.items() if key not in engine.frozen}
                writer.write(checkpoint / AVERAGE, partial(write_weights, trained))
    return {name: writer.take_digest(name + WRITING) for name in written}


def write_best(engine: TrainEngine, folder: Path, writer: CheckpointWriter) -> None:
    """Copy what `write_models` has written, still to be published as `model.best.safetensors`."""
    evaluated = folder / (name_of_evaluated(engine) + WRITING)
    copy = folder / (BEST + WRITING)
    writer.write(copy, lambda path: shutil.copyfile(evaluated, path))
    writer.take_digest(copy.name)


def publish_models(folder: Path) -> None:
    """Publish what `write_models` and `write_best` have written.

    A file that `write_models` has not written is removed: it is of an earlier run, or from before a
    change of settings.
    """
    for name in (WEIGHTS, AVERAGE, BEST):
        if (folder / (name + WRITING)).is_file():
            os.replace(folder / (name + WRITING), folder / name)
        elif name != BEST:
            (folder / name).unlink(missing_ok=True)
    sync_folder(folder)
