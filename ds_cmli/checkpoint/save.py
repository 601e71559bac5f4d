"""Writes a checkpoint beside the last one, publishes it by a rename, and lists checkpoints.

`checkpoint/stepN/` holds DeepSpeed's files, `state.json` and `rank-R.pt` (`TrainState`),
`student_ema.safetensors` of a run with averaged weights, `banks.pt` of one with banks of teacher
features, `frozen.safetensors` of one with frozen weights, and `checksums.json`. As frozen weights
stay the same, their file is a hard link to that of the checkpoint before where the disk has links.
`checkpoint/latest` names the newest complete checkpoint; until that file is replaced, the one
before is valid. Names of incomplete files and folders end in `.writing`. A folder `stepN.K` is a
later checkpoint of the same step.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ds_cmli.checkpoint import files, lock
from ds_cmli.checkpoint.files import CheckpointWriter, Entry, NotFinite
from ds_cmli.checkpoint.train_state import STATE, TrainState
from ds_cmli.checkpoint.weights import (
    AVERAGE,
    BANKS,
    FROZEN,
    WEIGHTS,
    frozen,
    full_averages,
    full_shape,
    full_weights,
    parts,
)
from ds_cmli.common import tensor_file
from ds_cmli.common.patches import patched
from ds_cmli.distributed import process_group as distributed
from ds_cmli.distributed.launchers import this_node
from ds_cmli.engine import TrainEngine
from ds_cmli.models.lora import merged
from ds_cmli.models.weights import not_finite

FOLDER = "checkpoint"
LATEST = "latest"  # DeepSpeed's name, so that its tools find the newest checkpoint too
WRITING = ".writing"
REPLACED = "replaced"  # an earlier run while a run that starts over in its folder has no checkpoint
BEST_WEIGHTS = "student-best.safetensors"  # of the best evaluation, with `run.keep_best`
# Upper bound: weights, fp32 copy and two moments, and the student's file.
BYTES_PER_PARAMETER = 24
BYTES_OF_FROZEN = 8  # per parameter: in the checkpoint and in the student's file
BYTES_OF_AVERAGE = 8  # per parameter: in the checkpoint and beside the student's file
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


@dataclass
class _Written:
    """What all ranks have written of a checkpoint."""

    files: dict[str, Entry]
    linked: int = 0  # bytes of these that the checkpoint before has too
    error: str | None = None  # of the first rank that has one
    not_finite: bool = False  # whether a tensor was not finite


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
    """The checkpoint that `latest` names; None if none is published, or the file cannot be read."""
    try:
        name = (root / LATEST).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return name if name in names(root) else None


def candidates(root: Path) -> list[str]:
    """The checkpoints to try: that of `latest` and older ones, newest first; or all."""
    known, newest = names(root), latest(root)
    if newest is not None:
        known = known[: known.index(newest) + 1]
    return known[::-1]


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
    refusal: str | None
    name, refusal = distributed.broadcast_object(prepared)  # collective
    writing = root / (name + WRITING)
    written = _Written({}, error=refusal)
    if refusal is None:
        written = _write(folder, writing, engine, state)  # collectives
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
    return Saved(name, time.monotonic() - started, size, refusal, written.not_finite)


def _prepare(root: Path, engine: TrainEngine, number: int) -> tuple[str, str | None]:
    """Remove incomplete checkpoints and make the new folder; returns a free name, and the error."""
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
    """The size of the next checkpoint: that of the last one, or an estimate from the parameters."""
    newest = latest(root)
    if newest is not None:
        with suppress(ValueError):
            entries = files.read_checksums(root / newest)
            return sum(entry["bytes"] for name, entry in entries.items() if name != FROZEN)
    each = BYTES_PER_PARAMETER + (BYTES_OF_AVERAGE if engine.ema is not None else 0)
    size = sum(x.nbytes for bank in engine.objective.banks().values() for x in bank.buffers())
    for parameter in engine.objective.parameters():
        of_it = each if parameter.requires_grad else BYTES_OF_FROZEN
        size += of_it * full_shape(parameter).numel()
    return size


def _write(folder: Path, writing: Path, train_engine: TrainEngine, state: TrainState) -> _Written:
    """Write the files of a checkpoint, and `student.safetensors` beside the old one.

    Collective; a failure to write does not raise, as then one rank alone would leave.
    """
    writer = CheckpointWriter()
    engine = train_engine.engine
    engine.checkpoint_engine = writer
    bad = not_finite(parts(engine))  # checked here, because no file holds ZeRO-3's 16-bit weights
    if bad is not None:
        writer.error = NotFinite(f"the weight {bad}")
    with patched("deepspeed: recovery script", lambda _: lambda self, path: None):
        engine.save_checkpoint(  # collectives
            str(writing.parent),
            tag=writing.name,
            save_latest=False,
            exclude_frozen_parameters=True,
        )
    writer.write_tensors(state.of_rank(), writing / f"rank-{distributed.rank()}.pt")
    banks = train_engine.objective.banks()
    if banks and distributed.is_main():  # they are the same on all ranks
        content = {name: dict(bank.named_buffers()) for name, bank in banks.items()}
        writer.write_tensors(content, writing / BANKS)
    weights = full_weights(train_engine.objective, engine.optimizer)  # collectives
    averages = full_averages(train_engine)  # collectives
    linked = 0
    if distributed.is_main() and writer.error is None:
        scale = train_engine.objective.student.lora_scale
        still = frozen(train_engine.objective)
        text = json.dumps(state.shared(), indent=1).encode()
        lock.check(folder)
        try:
            writer.files[STATE] = files.write_file(writing / STATE, lambda file: file.write(text))
            _write_weights(folder / (WEIGHTS + WRITING), merged(weights, scale))
            if still:
                held = {name: weights[name] for name in still}
                writer.files[FROZEN], linked = _link_or_write(writing / FROZEN, held)
            if averages is not None:
                moving = {name: x for name, x in averages.items() if name not in still}
                writer.files[AVERAGE] = _write_weights(writing / AVERAGE, moving)
                student = {name: averages[name] for name in weights}
                _write_weights(folder / (AVERAGE + WRITING), merged(student, scale))
        except OSError as error:
            writer.error = error
    problem = None if writer.error is None else str(writer.error).splitlines()[0]
    mine = (this_node(), writer.files, problem, isinstance(writer.error, NotFinite))
    nodes, entries, problems, bad_ones = zip(
        *distributed.gather_objects(mine),  # collective
        strict=True,
    )
    written = _Written({}, linked, not_finite=any(bad_ones))
    for theirs in entries:
        written.files |= theirs
    for rank, theirs in enumerate(problems):
        if theirs and written.error is None:
            written.error = f"{distributed.named(rank, nodes)}: {theirs}"
    return written


def _write_weights(path: Path, weights: Mapping[str, Tensor]) -> Entry:
    return _write_pieces(path, *tensor_file.pieces(weights))


def _write_pieces(path: Path, header: bytes, data: memoryview) -> Entry:
    def write(file: files.Hashing) -> None:
        file.write(header)
        file.write(data)

    return files.write_file(path, write)


def _link_or_write(path: Path, weights: Mapping[str, Tensor]) -> tuple[Entry, int]:
    """Write a file, or link to that of the checkpoint before if it is the same.

    Returns:
        its entry, and how many of its bytes the two share.
    """
    header, data = tensor_file.pieces(weights)
    mine = files.entry_of(header, data)
    root = path.parent.parent
    for before in candidates(root)[:1]:
        with suppress(OSError, ValueError, NotImplementedError):
            if files.read_checksums(root / before).get(path.name) == mine:
                os.link(root / before / path.name, path)
                return mine, mine["bytes"]
    return _write_pieces(path, header, data), 0


def _publish(folder: Path, root: Path, name: str, keep: int, best: int | None) -> None:
    """Publish the checkpoint that has been written, then remove old ones.

    `best` is the step of one that is kept.
    """
    os.replace(root / (name + WRITING), root / name)
    files.sync_folder(root)
    lock.check(folder)
    os.replace(folder / (WEIGHTS + WRITING), folder / WEIGHTS)
    evaluated = WEIGHTS
    if (folder / (AVERAGE + WRITING)).is_file():
        os.replace(folder / (AVERAGE + WRITING), folder / AVERAGE)
        evaluated = AVERAGE  # with averaged weights, the best result is theirs
    else:  # from an earlier run, or from before a change of settings
        (folder / AVERAGE).unlink(missing_ok=True)
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
    remove(folder / REPLACED)


def remove_incomplete(folder: Path) -> None:
    """Remove what a save that was interrupted has left in the run's folder."""
    for path in (*folder.glob("*" + WRITING), *(folder / FOLDER).glob("*" + WRITING)):
        remove(path)


def remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
