"""Writes a checkpoint next to the last one, and publishes it by a rename.

`checkpoint/stepN/` holds DeepSpeed's files, `state.json` and `rank-R.pt` (`TrainState`),
`student_ema.safetensors` of a run with averaged weights, `frozen.safetensors` of one with frozen
weights, and `checksums.json`. As frozen weights stay the same, their file is a hard link to that of
the checkpoint before where the disk has links.
`checkpoint/latest` names the newest complete checkpoint; until that file is replaced, the one
before is valid. Names of incomplete files and folders end in `.writing`. A folder `stepN.K` is a
later checkpoint of the same step.
"""

import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ds_cmli.checkpoint import files, lock
from ds_cmli.checkpoint.contents import (
    FOLDER,
    LATEST,
    candidates,
    latest,
    names,
    remove,
    remove_incomplete,
    step_of,
)
from ds_cmli.checkpoint.train_state import TrainState
from ds_cmli.checkpoint.weights import (
    AVERAGE,
    FROZEN,
    WEIGHTS,
    full_averages,
    full_shape,
    full_weights,
)
from ds_cmli.checkpoint.write import WRITING, Written, write, write_student
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import TrainEngine

BEST_WEIGHTS = "student-best.safetensors"  # of the best evaluation, with `run.keep_best`
# Upper bound: weights, fp32 copy and two moments, and the student's file.
BYTES_PER_PARAMETER = 24
BYTES_OF_FROZEN = 8  # per parameter: in the checkpoint and in the student's file
BYTES_OF_AVERAGE = 8  # per parameter: in the checkpoint and next to the student's file
MARGIN = 1.1  # a checkpoint needs this many times its expected size of free space


@dataclass
class Saved:
    """The result of saving a checkpoint; `error` says why it was not saved."""

    name: str
    seconds: float
    bytes: int = 0
    error: str | None = None
    not_finite: bool = False  # the error is that a tensor has NaN or inf
    before: str | None = None  # the checkpoint before

    def line(self, step: int) -> str:
        if self.error is not None:
            kept = "there is none before"
            if self.before is not None:
                kept = "the one before stays"
            return f"warning: no checkpoint at step {step}, {kept}: {self.error}"
        return f"checkpoint {self.name}: {self.bytes / 1e6:.1f} MB in {self.seconds:.2f} s"


def save(
    folder: Path, engine: TrainEngine, state: TrainState, keep: int, keep_best: bool = False
) -> Saved:
    """Write and publish a checkpoint of the run in `folder`, and its `student.safetensors`.

    If writing fails on any rank, for instance on a full disk, the files published before are
    unchanged. Collective.
    """
    started = time.monotonic()
    root = folder / FOLDER
    prepared = _prepare(root, engine, state.step) if distributed.is_main() else None
    name: str
    before: str | None
    refusal: str | None
    name, before, refusal = distributed.broadcast_object(prepared)  # collective
    writing = root / (name + WRITING)
    written = Written({}, error=refusal)
    if refusal is None:
        written = write(folder, writing, engine, state, before)  # collectives
        refusal = written.error
    if distributed.is_main():
        lock.check(folder)
        try:
            if refusal is None:
                files.write_checksums(writing, written.files)
                _publish(folder, root, name, keep, state.best.get("step") if keep_best else None)
        except OSError as error:
            refusal = str(error)
        if refusal is not None:
            with suppress(OSError):  # what could not be written can often not be removed either
                remove_incomplete(folder)
    # Collective: no rank continues or ends before it is published.
    refusal = distributed.broadcast_object(refusal)
    every = sum(entry["bytes"] for entry in written.files.values())
    size = 0 if refusal else every - written.linked
    return Saved(name, time.monotonic() - started, size, refusal, written.not_finite, before)


def save_student(folder: Path, engine: TrainEngine) -> bool:
    """Publish the student's weights, where there is no room for a checkpoint of them.

    Returns whether they could be written. Collective.
    """
    weights = full_weights(engine.objective)  # collectives
    averages = full_averages(engine)  # collectives
    written = True
    if distributed.is_main():
        lock.check(folder)
        try:
            write_student(folder, engine, weights, averages)
            _publish_student(folder)
        except OSError:
            written = False
            with suppress(OSError):
                remove_incomplete(folder)
    return distributed.broadcast_object(written)  # collective


def _prepare(root: Path, engine: TrainEngine, number: int) -> tuple[str, str | None, str | None]:
    """Remove incomplete checkpoints and make the new folder.

    Returns:
        a free name, the name of the checkpoint before, and the error.
    """
    lock.check(root.parent)
    name = first = f"step{number}"
    before = None
    again = 0
    try:
        known = names(root)
        while name in known:
            again += 1
            name = f"{first}.{again}"
        before = next(iter(candidates(root)), None)
        root.mkdir(parents=True, exist_ok=True)
        remove_incomplete(root.parent)
        need = MARGIN * _expected_bytes(root, engine)
        free = shutil.disk_usage(root).free
        if free < need:
            error = f"it needs about {need / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free"
            return name, before, error
        (root / (name + WRITING)).mkdir()
    except OSError as error:
        return name, before, str(error)
    return name, before, None


def _expected_bytes(root: Path, engine: TrainEngine) -> int:
    """The size of the next checkpoint: that of the last one, or an estimate from the parameters."""
    newest = latest(root)
    if newest is not None:
        with suppress(ValueError):
            entries = files.read_checksums(root / newest)
            return sum(entry["bytes"] for name, entry in entries.items() if name != FROZEN)
    per_parameter = BYTES_PER_PARAMETER + (BYTES_OF_AVERAGE if engine.ema is not None else 0)
    size = 0
    for parameter in engine.objective.parameters():
        of_it = per_parameter if parameter.requires_grad else BYTES_OF_FROZEN
        size += of_it * full_shape(parameter).numel()
    return size


def _publish(folder: Path, root: Path, name: str, keep: int, best: int | None) -> None:
    """Publish the checkpoint that has been written, then remove old ones.

    `best` is the step of one that is kept.
    """
    os.replace(root / (name + WRITING), root / name)
    files.sync_folder(root)
    lock.check(folder)
    evaluated = _publish_student(folder)
    if best == step_of(name):
        shutil.copyfile(folder / evaluated, folder / (BEST_WEIGHTS + WRITING))
        os.replace(folder / (BEST_WEIGHTS + WRITING), folder / BEST_WEIGHTS)
    files.sync_folder(folder)
    before = candidates(root)
    lock.check(folder)
    files.publish(root / LATEST, name.encode())
    # Checkpoints newer than the one published before are left over from before a resume from an
    # older one.
    kept = {name, *[n for n in before if n != name][: keep - 1]}
    kept |= {*[n for n in (name, *before) if step_of(n) == best][:1]}
    for other in names(root):
        if other not in kept:
            remove(root / other)


def _publish_student(folder: Path) -> str:
    """Replace the student's files by those just written; returns the name of the evaluated one."""
    os.replace(folder / (WEIGHTS + WRITING), folder / WEIGHTS)
    evaluated = WEIGHTS
    if (folder / (AVERAGE + WRITING)).is_file():
        os.replace(folder / (AVERAGE + WRITING), folder / AVERAGE)
        evaluated = AVERAGE  # with averaged weights, the best result is theirs
    else:  # from an earlier run, or from before a change of settings
        (folder / AVERAGE).unlink(missing_ok=True)
    files.sync_folder(folder)
    return evaluated
