"""The files beside `checkpoint/`: the student, its averages, and the best of both evaluations.

They follow from the checkpoints, whose `state.json` has their SHA-256. transformers loads them with
the files that `models/hf.py` writes.
"""

import os
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from ds_cmli.checkpoint.lock import written_together
from ds_cmli.checkpoint.storage import WRITING, CheckpointWriter, remove_incomplete, sync_folder
from ds_cmli.checkpoint.weights import collect_weights, write_weights
from ds_cmli.commands import print_line
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import TrainEngine
from ds_cmli.models.adapters import merge_adapters
from ds_cmli.models.hf import AVERAGE, BEST, WEIGHTS

DISTILLATION_HEAD = "width_head."  # the head to the teacher's width, which is not the student's


def write_models(
    engine: TrainEngine,
    folder: Path,
    writer: CheckpointWriter,
    is_best: bool,
    checkpoint: Path | None = None,
) -> dict[str, str | None]:
    """Write the student and its averages, still to be published by `publish_models`. Collective.

    Args:
        is_best: also write the best file: the averages if there are any, else the weights.
        checkpoint: the folder of a checkpoint, which gets the averages of the trained weights.

    Returns:
        The names of the files and their SHA-256, None after an error and on other ranks than 0.
    """
    # By file name: the context in which the weights to write are the master weights.
    swaps: dict[str, AbstractContextManager[None]] = {WEIGHTS: nullcontext()}
    if engine.ema is not None:
        swaps[AVERAGE] = engine.ema.as_master_weights()
    # One after the other, so that one of them is on the host at a time.
    for name, swap in swaps.items():
        with swap:
            weights = collect_weights(engine)  # collectives
            if not distributed.is_main():
                continue
            student = {
                parameter: value
                for parameter, value in weights.items()
                if not parameter.startswith(DISTILLATION_HEAD)
            }
            merged = merge_adapters(student, engine.objective.student.lora_scale)
            writer.write(folder / (name + WRITING), partial(write_weights, merged))
            if name == AVERAGE and checkpoint is not None:
                trained = {key: value for key, value in weights.items() if key not in engine.frozen}
                writer.write(checkpoint / AVERAGE, partial(write_weights, trained))
    digests = {name: writer.take_digest(name + WRITING) for name in swaps}
    if is_best and distributed.is_main():
        evaluated_name = WEIGHTS if engine.ema is None else AVERAGE
        evaluated = folder / (evaluated_name + WRITING)
        writer.write(folder / (BEST + WRITING), partial(shutil.copyfile, evaluated))
        writer.take_digest(BEST + WRITING)
    return digests


def publish_models(folder: Path, names: Iterable[str] = (WEIGHTS, AVERAGE, BEST)) -> None:
    """Publish what `write_models` has written.

    A file that `write_models` has not written is removed: it is of an earlier run, or from before a
    change of settings.
    """
    for name in names:
        if (folder / (name + WRITING)).is_file():
            os.replace(folder / (name + WRITING), folder / name)
        elif name != BEST:
            (folder / name).unlink(missing_ok=True)
    sync_folder(folder)


def make_models(engine: TrainEngine, folder: Path, names: list[str], checkpoint: Path) -> None:
    """Make files anew from the checkpoint that the engine holds. Collective."""
    print_line(f"made from {checkpoint}: {', '.join(names)}")
    writer = CheckpointWriter()
    write_models(engine, folder, writer, is_best=BEST in names)  # collectives
    writer.gather()  # collective
    with written_together(folder):  # collective
        if writer.error is not None:
            raise OSError(writer.error)
        if distributed.is_main():
            # From an older checkpoint only BEST is made; its other files are not the newest ones.
            publish_models(folder, [BEST] if names == [BEST] else (WEIGHTS, AVERAGE, BEST))
            remove_incomplete(folder)
