"""Checkpoints: deciding when one is due, writing it beside the last one, publishing it by a rename, and listing them.

`checkpoint/stepN/` holds DeepSpeed's files, `state.json` and `rank-R.pt` (`TrainState`), `student_ema.safetensors` of a
run with averaged weights, and `checksums.json`. `checkpoint/latest` names the newest complete checkpoint; until that
file is replaced, the checkpoint before is the valid one. Names of incomplete files and folders end in `.writing`. A
folder `stepN.K` is a later checkpoint of the same step.
"""

import json
import os
import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_cmli.checkpoint import average, checksums, lock
from ds_cmli.checkpoint.train_state import STATE, TrainState
from ds_cmli.checkpoint.weights import AVERAGE, WEIGHTS, full_shape, full_weights, parts
from ds_cmli.common import tensor_file
from ds_cmli.common.errors import UserError
from ds_cmli.common.patches import patched
from ds_cmli.config.schema import RunConfig
from ds_cmli.distributed import process_group as distributed
from ds_cmli.distributed.master_address import this_node
from ds_cmli.engine import TrainEngine

FOLDER = "checkpoint"
LATEST = "latest"  # DeepSpeed's name, so that its tools find the newest checkpoint too
WRITING = ".writing"
REPLACED = "replaced"  # holds the earlier run while a run that starts over in its folder has no checkpoint yet
BYTES_PER_PARAMETER = 24  # upper bound: weights, fp32 copy and two moments, and the student's file
BYTES_OF_AVERAGE = (
    8  # bytes per parameter for the averages: in the checkpoint and beside the student's file
)
BEST_WEIGHTS = (
    "student-best.safetensors"  # the student of the best evaluation, with `run.keep_best`
)
MARGIN = 1.1  # a checkpoint needs this many times its expected size of free space


@dataclass
class Saved:
    """The result of saving a checkpoint; `error` says why it was not saved."""

    name: str
    seconds: float
    bytes: int = 0
    error: str | None = None
    not_finite: bool = False  # the error is that a tensor has NaN or inf

    def line(self, step: int) -> str:
        if self.error is not None:
            return f"warning: no checkpoint at step {step}, the one before stays: {self.error}"
        return f"checkpoint {self.name}: {self.bytes / 1e6:.1f} MB in {self.seconds:.2f} s"


class Checkpoints:
    """The checkpoints of the run in `folder`: tells when one is due and which state the last one holds."""

    def __init__(self, folder: Path, engine: TrainEngine, settings: RunConfig, state: TrainState):
        self.folder, self.engine, self.settings = folder, engine, settings
        self.saved, self.saved_at = self._mark(state), time.monotonic()
        self.name = latest(folder / FOLDER)  # of the last checkpoint
        self.error: str | None = None  # why the last one could not be written
        self.gone, self.told_gone = False, False

    def missing(self) -> list[str]:
        """On rank 0: a line if the last checkpoint is not there any more, once; the next one is then due at once.

        Other ranks do not look: a folder on a network shows them a new checkpoint late.
        """
        if not distributed.is_main() or self.told_gone or self.name is None:
            return []
        if (self.folder / FOLDER / self.name / checksums.NAME).is_file():
            return []
        self.gone = self.told_gone = True
        return [
            f"warning: {self.folder / FOLDER / self.name} is gone: a checkpoint is written anew"
        ]

    def due(self) -> bool:
        """Whether a checkpoint is due by this rank's clock, or because the last one is gone."""
        return self.gone or 0 < 60 * self.settings.save_minutes < time.monotonic() - self.saved_at

    def asked_for_by_the_evaluation(self, state: TrainState) -> bool:
        """Whether the last evaluation ends the run, or has found the best result so far, whose checkpoint is kept."""
        return state.out_of_patience(self.settings.patience) or (
            self.settings.keep_best and state.is_best
        )

    def holds(self, state: TrainState) -> bool:
        """Whether `state` has been saved: it is that of the last checkpoint, or that of the start. Collective."""
        there = self.name is None or (self.folder / FOLDER / self.name / checksums.NAME).is_file()
        weights = self.name is None or (self.folder / WEIGHTS).is_file()
        return distributed.broadcast_object(
            self.saved == self._mark(state) and there and weights
        )  # collective

    def save(self, state: TrainState) -> Saved:
        """Save a checkpoint of `state`. Collective."""
        keep_best = self.settings.keep_best
        saved = save(self.folder, self.engine, state, self.settings.keep, keep_best)  # collectives
        self.error, self.gone = saved.error, False
        if saved.error is None:
            self.saved, self.name, self.told_gone = self._mark(state), saved.name, False
        self.saved_at = time.monotonic()
        return saved

    def diverged(self, what: str, state: TrainState) -> str:
        """The error message of a diverged run, with its first bad step and the last good checkpoint."""
        first = state.step - max(0, state.skipped_in_row - 1)
        root = self.folder / FOLDER
        good = latest(root)
        kept = (
            f"the last good checkpoint is {root / good}"
            if good
            else "no checkpoint had been saved before"
        )
        return (
            f"the run has diverged: {what}; the first bad step is {first}, {kept}. Look at the "
            f"samples that {self.folder / 'metrics.jsonl'} names, or start over with a lower --lr"
        )

    def closing_lines(self, state: TrainState) -> list[str]:
        """The lines to print at the end of a run. Collective.

        Raises:
            UserError: its last checkpoint is missing.
        """
        if not self.holds(state):  # collective
            raise UserError(
                f"the last checkpoint could not be written ({self.error}): mend that, and start {self.folder} again"
            )
        best = state.best
        over = f" ({best['pairs']} pairs, chance {best['chance']:.3f})" if "pairs" in best else ""
        names = (
            "config.json",
            "metrics.jsonl",
            "tensorboard",
            FOLDER,
            WEIGHTS,
            AVERAGE,
            BEST_WEIGHTS,
        )
        files = [
            name + "/" * (self.folder / name).is_dir()
            for name in names
            if (self.folder / name).exists()
        ]
        ended = f"ended at step {state.step}: {state.worse_in_row} evaluations in a row gave no better result"
        return [
            *([ended] if state.out_of_patience(self.settings.patience) else []),
            f"best {best['metric']} {best['value']:.3f} at step {best['step']}{over}",
            f"written to {self.folder}: {', '.join(files)}",
        ]

    @staticmethod
    def _mark(state: TrainState) -> tuple[int, bool]:
        return state.step, state.evaluated


def step_of(name: str) -> int:
    """The step of a checkpoint, from its name."""
    return int(name.removeprefix("step").partition(".")[0])


def names(root: Path) -> list[str]:
    """The checkpoints in `root`, oldest first."""
    numbered = []
    for path in root.iterdir() if root.is_dir() else ():
        match = re.fullmatch(r"step(\d+)(?:\.(\d+))?", path.name)
        if match and path.is_dir():
            numbered.append((int(match[1]), int(match[2] or 0), path.name))
    return [name for *_, name in sorted(numbered)]


def latest(root: Path) -> str | None:
    """The checkpoint that `latest` names; None if none has been published, or the file cannot be read."""
    try:
        name = (root / LATEST).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return name if name in names(root) else None


def candidates(root: Path) -> list[str]:
    """The checkpoints to try, in order: that of `latest` and older ones, newest first; all if there is no `latest`."""
    known, newest = names(root), latest(root)
    return (known if newest is None else known[: known.index(newest) + 1])[::-1]


def save(
    folder: Path, engine: TrainEngine, state: TrainState, keep: int, keep_best: bool = False
) -> Saved:
    """Write and publish a checkpoint of the run in `folder`, and its `student.safetensors`. Collective.

    If writing fails on any rank, for instance on a full disk, the files published before are unchanged.
    """
    started = time.monotonic()
    root = folder / FOLDER
    name, refusal = distributed.broadcast_object(
        _prepare(root, engine, state.step) if distributed.is_main() else None
    )  # collective
    writing = root / (name + WRITING)
    not_finite = False
    if refusal is None:
        files, refusal, not_finite = _write(folder, writing, engine, state)  # collectives
    if distributed.is_main():
        lock.check(folder)
        try:
            if refusal is None:
                checksums.write(writing, files)
                _publish(folder, root, name, keep, state.best.get("step") if keep_best else None)
        except OSError as error:
            refusal = str(error)
        if refusal is not None:
            with suppress(OSError):  # what could not be written can often not be removed either
                remove_incomplete(folder)
    refusal = distributed.broadcast_object(
        refusal
    )  # collective: no rank continues or ends before it is published
    size = 0 if refusal else sum(file["bytes"] for file in files.values())
    return Saved(name, time.monotonic() - started, size, refusal, not_finite)


def _prepare(root: Path, engine: TrainEngine, number: int) -> tuple[str, str | None]:
    """Remove incomplete checkpoints and make the new folder; returns a free name, and the error or None."""
    lock.check(root.parent)
    name = first = f"step{number}"
    again = 0
    try:
        known = names(root)
        while name in known:
            again += 1
            name = f"{first}.{again}"
        root.mkdir(parents=True, exist_ok=True)
        remove_incomplete(root.parent)
        need = MARGIN * _expected_bytes(root, engine)
        free = shutil.disk_usage(root).free
        if free < need:
            return name, f"it needs about {need / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free"
        (root / (name + WRITING)).mkdir()
    except OSError as error:
        return name, str(error)
    return name, None


def _expected_bytes(root: Path, engine: TrainEngine) -> int:
    """The size of the next checkpoint: that of the last one, or an estimate from the number of parameters."""
    newest = latest(root)
    if newest is not None:
        try:
            return sum(file["bytes"] for file in checksums.read(root / newest).values())
        except ValueError:
            pass
    each = BYTES_PER_PARAMETER + (BYTES_OF_AVERAGE if engine.ema is not None else 0)
    return each * sum(full_shape(p).numel() for p in engine.objective.parameters())


def _write(
    folder: Path, writing: Path, train_engine: TrainEngine, state: TrainState
) -> tuple[dict[str, dict[str, Any]], str | None, bool]:
    """Write the files of a checkpoint, and `student.safetensors` beside the old one.

    Collective; a failure to write does not raise, as then one rank alone would leave.

    Returns:
        Sizes and checksums of the files of all ranks, the error or None, and whether a tensor was not finite.
    """
    from ds_cmli.checkpoint.io import CheckpointWriter, NotFinite, not_finite, write_tensors

    writer = CheckpointWriter()
    engine = train_engine.engine
    engine.checkpoint_engine = writer
    bad = not_finite(parts(engine))  # checked here, because no file holds ZeRO-3's 16-bit weights
    if bad is not None:
        writer.error = NotFinite(f"the weight {bad}")
    with patched("deepspeed: recovery script", lambda _: lambda self, path: None):
        engine.save_checkpoint(
            str(writing.parent), tag=writing.name, save_latest=False
        )  # collectives
    write_tensors(writer, state.of_rank(), writing / f"rank-{distributed.rank()}.pt")
    weights = full_weights(train_engine.objective, engine.optimizer)  # collectives
    averages = average.full_averages(train_engine)  # collectives
    if distributed.is_main() and writer.error is None:
        text = json.dumps(state.shared(), indent=1)
        lock.check(folder)
        try:
            writer.files[STATE] = checksums.write_file(
                writing / STATE, lambda file: file.write(text.encode())
            )
            _write_weights(folder / (WEIGHTS + WRITING), weights)
            if averages is not None:
                writer.files[AVERAGE] = _write_weights(writing / AVERAGE, averages)
                _write_weights(
                    folder / (AVERAGE + WRITING), {name: averages[name] for name in weights}
                )
        except OSError as error:
            writer.error = error
    problem = None if writer.error is None else str(writer.error).splitlines()[0]
    mine = (this_node(), writer.files, problem, isinstance(writer.error, NotFinite))
    nodes, all_files, problems, bad_ones = zip(
        *distributed.gather_objects(mine), strict=True
    )  # collective
    files = {name: file for theirs in all_files for name, file in theirs.items()}
    first = next((rank for rank, theirs in enumerate(problems) if theirs), None)
    refusal = None if first is None else f"{distributed.named(first, nodes)}: {problems[first]}"
    return files, refusal, any(bad_ones)


def _write_weights(path: Path, weights: dict[str, Any]) -> dict[str, Any]:
    header, data = tensor_file.pieces(weights)

    def write(file: Any) -> None:
        file.write(header)
        file.write(data)

    return checksums.write_file(path, write)


def _publish(folder: Path, root: Path, name: str, keep: int, best: int | None) -> None:
    """Publish the checkpoint that has been written, then remove old ones; `best` is the step of one that is kept."""
    os.replace(root / (name + WRITING), root / name)
    checksums.sync_folder(root)
    lock.check(folder)
    os.replace(folder / (WEIGHTS + WRITING), folder / WEIGHTS)
    if (folder / (AVERAGE + WRITING)).is_file():
        os.replace(folder / (AVERAGE + WRITING), folder / AVERAGE)
    else:
        (folder / AVERAGE).unlink(
            missing_ok=True
        )  # from an earlier run, or from before a change of settings
    if best == step_of(name):
        # With averaged weights, the best result is theirs.
        evaluated = AVERAGE if (folder / AVERAGE).is_file() else WEIGHTS
        shutil.copyfile(folder / evaluated, folder / (BEST_WEIGHTS + WRITING))
        os.replace(folder / (BEST_WEIGHTS + WRITING), folder / BEST_WEIGHTS)
    checksums.sync_folder(folder)
    before = candidates(root)
    lock.check(folder)
    checksums.publish(root / LATEST, name.encode())
    # Checkpoints newer than the one published before are left over from before a resume from an older one.
    kept = {name, *[n for n in before if n != name][: keep - 1]}
    kept |= {*[n for n in (name, *before) if step_of(n) == best][:1]}
    for other in names(root):
        if other not in kept:
            remove(root / other)
    remove(folder / REPLACED)


def remove_incomplete(folder: Path) -> None:
    """Remove what a save that was interrupted has left in the run's folder."""
    for path in (*folder.glob("*" + WRITING), *(folder / FOLDER).glob("*" + WRITING)):
        remove(path)


def remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
