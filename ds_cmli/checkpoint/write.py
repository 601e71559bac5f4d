"""Writes the files of a checkpoint and of the student, each under a name that ends in `.writing`.

Nothing of them counts until `save.py` publishes them.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ds_cmli.checkpoint import files, lock
from ds_cmli.checkpoint.files import CheckpointWriter, FileEntry, NotFinite
from ds_cmli.checkpoint.train_state import STATE, TrainState
from ds_cmli.checkpoint.weights import (
    AVERAGE,
    FROZEN,
    WEIGHTS,
    frozen,
    full_averages,
    full_weights,
    parts,
)
from ds_cmli.common import tensor_file
from ds_cmli.common.errors import first_line
from ds_cmli.common.patches import patched
from ds_cmli.distributed import process_group as distributed
from ds_cmli.distributed.launchers import this_node
from ds_cmli.engine import TrainEngine
from ds_cmli.models.lora import merged
from ds_cmli.models.weights import not_finite

WRITING = ".writing"


@dataclass
class Written:
    """What all ranks have written of a checkpoint."""

    files: dict[str, FileEntry]
    linked: int = 0  # bytes of these that the checkpoint before has too
    error: str | None = None  # of the first rank that has one
    not_finite: bool = False  # whether a tensor was not finite


def write(
    folder: Path, writing: Path, train_engine: TrainEngine, state: TrainState, before: str | None
) -> Written:
    """Write the files of a checkpoint, and `student.safetensors` next to the old one.

    `before` names the checkpoint before, if there is one, whose frozen weights are linked to.
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
    weights = full_weights(train_engine.objective)  # collectives
    averages = full_averages(train_engine)  # collectives
    linked = 0
    if distributed.is_main() and writer.error is None:
        still = frozen(train_engine.objective)
        text = json.dumps(state.shared(), indent=1).encode()
        lock.check(folder)
        try:
            writer.files[STATE] = files.write_file(writing / STATE, lambda file: file.write(text))
            write_student(folder, train_engine, weights, averages)
            if still:
                held = {name: weights[name] for name in still}
                writer.files[FROZEN], linked = _link_or_write(writing / FROZEN, held, before)
            if averages is not None:
                moving = {name: x for name, x in averages.items() if name not in still}
                writer.files[AVERAGE] = write_weights(writing / AVERAGE, moving)
        except OSError as error:
            writer.error = error
    problem = None if writer.error is None else first_line(writer.error)
    mine = (this_node(), writer.files, problem, isinstance(writer.error, NotFinite))
    nodes, entries, problems, bad_ones = zip(
        *distributed.gather_objects(mine),  # collective
        strict=True,
    )
    written = Written({}, linked, not_finite=any(bad_ones))
    for theirs in entries:
        written.files |= theirs
    for rank, theirs in enumerate(problems):
        if theirs and written.error is None:
            written.error = f"{distributed.named(rank, nodes)}: {theirs}"
    return written


def write_student(
    folder: Path,
    engine: TrainEngine,
    weights: Mapping[str, Tensor],
    averages: Mapping[str, Tensor] | None,
) -> None:
    """Write the student's files next to the old ones."""
    scale = engine.objective.student.lora_scale
    write_weights(folder / (WEIGHTS + WRITING), merged(weights, scale))
    if averages is not None:
        student = {name: averages[name] for name in weights}
        write_weights(folder / (AVERAGE + WRITING), merged(student, scale))


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> FileEntry:
    return _write_pieces(path, *tensor_file.pieces(weights))


def _write_pieces(path: Path, header: bytes, data: memoryview) -> FileEntry:
    def write(file: files.Hashing) -> None:
        file.write(header)
        file.write(data)

    return files.write_file(path, write)


def _link_or_write(
    path: Path, weights: Mapping[str, Tensor], before: str | None
) -> tuple[FileEntry, int]:
    """Write a file, or link to that of the checkpoint before if it is the same.

    Returns:
        its entry, and how many of its bytes the two share.
    """
    header, data = tensor_file.pieces(weights)
    mine = files.entry_of(header, data)
    if before is not None:
        other = path.parent.parent / before
        with suppress(OSError, ValueError, NotImplementedError):
            if files.read_checksums(other).get(path.name) == mine:
                os.link(other / path.name, path)
                return mine, mine["bytes"]
    return _write_pieces(path, header, data), 0
