"""Writes a checkpoint beside the last one and publishes it by a rename.

`checkpoint/stepN/` holds DeepSpeed's files, `state.json` and `rank-R.pt` (`TrainState`), the
averages as `model.ema.safetensors`, and `checksums.json`; `stepN.K` is a later one of the same
step. `checkpoint/latest` names the newest, and `checkpoint/frozen-DIGEST.safetensors` has the
weights that are not trained, once for all checkpoints. Beside `checkpoint/` lie
`model.safetensors` and `model.ema.safetensors` of the newest, `model.best.safetensors` of the best,
which transformers loads with the files of `models/hf.py`. What is still being written has a name
that ends in `.writing`.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from safetensors import SafetensorError

from ds_cmli.checkpoint.state import STATE, TrainState
from ds_cmli.checkpoint.weights import full_averages, full_weights, write_weights
from ds_cmli.config.schema import RunConfig
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import TrainEngine
from ds_cmli.errors import UserError, one_line
from ds_cmli.files import read_json, sha256
from ds_cmli.models.blocks import merged
from ds_cmli.models.hf import AVERAGE, BEST, WEIGHTS

OF_DISTILLATION = "width_head."  # the head to the teacher's width, which is not the student's
FOLDER, LATEST, CHECKSUMS, WRITING = "checkpoint", "latest", "checksums.json", ".writing"

# --- names


def steps(root: Path) -> dict[Path, int]:
    """The checkpoints in `root` and their steps, oldest first."""
    named = ((re.fullmatch(r"step(\d+)(?:\.(\d+))?", path.name), path) for path in root.glob("*"))
    known = [(int(m[1]), int(m[2] or 0), path) for m, path in named if m and path.is_dir()]
    return {path: step for step, _, path in sorted(known)}


def candidates(root: Path) -> list[Path]:
    """Those to load in turn: newest first, from the one in `latest` if that is there."""
    known = [*steps(root)]
    with suppress(OSError, ValueError):
        newest = root / (root / LATEST).read_text().strip()
        known = known[: known.index(newest) + 1]
    return known[::-1]


# --- files


def write(path: Path, write_to: Callable[[Path], object]) -> str:
    """Make a file by `write_to(path)`, sync it to disk, and return its SHA-256. Raises OSError."""
    try:
        write_to(path)
    except (RuntimeError, SafetensorError) as error:  # in place of a full disk's OSError
        raise OSError(one_line(error)) from error
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return sha256(path)


def publish(path: Path, data: bytes) -> None:
    """Replace `path` atomically and durably: a reader sees the old or the new file."""
    beside = path.with_name(path.name + WRITING)
    write(beside, lambda file: file.write_bytes(data))
    os.replace(beside, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk; otherwise a power failure can undo a rename."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def remove_incomplete(folder: Path) -> None:
    """Remove what a save that was interrupted has left in the run's folder."""
    for path in (*folder.glob("*" + WRITING), *(folder / FOLDER).glob("*" + WRITING)):
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if all files agree with `checksums.json`."""
    name = CHECKSUMS
    try:
        for name, digest in read_json(folder / CHECKSUMS).items():
            if sha256(folder / name) != digest:
                raise ValueError("another content")
    except (OSError, ValueError) as error:
        return f"{name} (by {CHECKSUMS}): {getattr(error, 'strerror', None) or error}"
    return None


class CheckpointWriter(TorchCheckpointEngine):
    """Writes files, DeepSpeed's too, durably, and records the first error instead of raising it.

    If one rank left DeepSpeed's `save_checkpoint`, the others would wait in it for ever.
    """

    def __init__(self):
        super().__init__()
        self.digests: dict[str, str] = {}  # the SHA-256 of each file
        self.error: str | None = None

    def makedirs(self, path, exist_ok=False):
        pass  # it is there

    def save(self, state_dict, path):
        self.write(Path(path), partial(torch.save, state_dict))

    def load(self, path, map_location=None):
        return torch.load(path, map_location=map_location, weights_only=True)

    def write(self, path: Path, write_to: Callable[[Path], object]) -> None:
        self.attempt(lambda: self.digests.update({path.name: write(path, write_to)}))

    def attempt(self, action: Callable[[], object]) -> None:
        if self.error is None:
            try:
                action()
            except OSError as error:
                self.error = one_line(error)

    def gather(self) -> None:
        """Give all ranks the files of all, and the error of the first that has one. Collective."""
        every = distributed.gather_objects((self.digests, self.error))  # collective
        for rank, (digests, error) in enumerate(every):
            self.digests |= digests
            self.error = self.error or (error and f"rank {rank}: {error}")


# --- a run's checkpoints


@dataclass
class Checkpoints:
    """The checkpoints of a run: when one is due, and which state the last holds."""

    folder: Path
    engine: TrainEngine
    settings: RunConfig
    saved: tuple[int, bool]  # step and whether it was evaluated, of the last one or of the start
    saved_at: float = field(default_factory=time.monotonic)
    error: str | None = None  # why the last one could not be written
    frozen: dict[str, str] = field(default_factory=dict)  # the file of the weights not trained

    def due(self) -> bool:
        """By this rank's clock."""
        return 0 < 60 * self.settings.save_minutes < time.monotonic() - self.saved_at

    def due_after_evaluation(self, state: TrainState) -> bool:
        """Whether the last evaluation ends the run, or has found the best result, which is kept."""
        best = self.settings.keep_best and state.is_best
        return state.out_of_patience(self.settings.patience) or best

    def holds(self, state: TrainState) -> bool:
        """Whether `state` is that of the last checkpoint, or that of the start."""
        return self.saved == (state.step, state.evaluated)

    def save(self, state: TrainState) -> str:
        """Write and publish a checkpoint: the line that tells of it. Collective.

        If that fails on any rank, as on a full disk, the files published before are unchanged.
        """
        started, main, root = time.monotonic(), distributed.is_main(), self.folder / FOLDER
        name, again = f"step{state.step}", 0
        if main:
            with suppress(OSError):
                remove_incomplete(self.folder)
            while (root / name).is_dir():
                again += 1
                name = f"step{state.step}.{again}"
        name = distributed.broadcast_object(name)  # collective
        writer = CheckpointWriter()
        self._write(writer, root / (name + WRITING), state)  # collectives
        writer.gather()  # collective
        if main:
            writer.attempt(lambda: self._publish(name, state, writer.digests))
            if writer.error is not None:
                with suppress(OSError):  # what cannot be written can often not be removed either
                    remove_incomplete(self.folder)
        # Collective: no rank continues or ends before it is published.
        self.error = distributed.broadcast_object(writer.error)
        self.saved_at = time.monotonic()
        if self.error is not None:
            kept = "the one before stays" if steps(root) else "there is none before"
            return f"warning: no checkpoint at step {state.step}, {kept}: {self.error}"
        self.saved = state.step, state.evaluated
        size = sum(path.stat().st_size for path in (root / name).iterdir()) if main else 0
        return f"checkpoint {name}: {size / 1e6:.1f} MB in {self.saved_at - started:.2f} s"

    def _write(self, writer: CheckpointWriter, to: Path, state: TrainState) -> None:
        """Write DeepSpeed's files, the student's, and the state's. Collective."""
        engine, frozen = self.engine.engine, self.engine.frozen
        engine.checkpoint_engine = writer
        # A script that writes the weights of `model.safetensors` would be copied into each.
        engine._copy_recovery_script = lambda path: None
        writer.attempt(lambda: to.mkdir(parents=True, exist_ok=True))
        engine.save_checkpoint(  # collectives
            str(to.parent), tag=to.name, save_latest=False, exclude_frozen_parameters=True
        )
        weights, averages = full_weights(self.engine), full_averages(self.engine)  # collectives
        of_rank = partial(torch.save, state.of_rank())  # CPU-GPU sync
        writer.write(to / f"rank-{distributed.rank()}.pt", of_rank)
        if not distributed.is_main():
            return
        scale = self.engine.objective.student.lora_scale
        for file, tensors in ((WEIGHTS, weights), (AVERAGE, averages)):
            if tensors is not None:  # with averages the best result is theirs
                own = {k: x for k, x in tensors.items() if not k.startswith(OF_DISTILLATION)}
                path = self.folder / (file + WRITING)
                writer.write(path, partial(write_weights, merged(own, scale)))
                digest = writer.digests.pop(path.name, None)
                if state.is_best:
                    state.best["sha256"] = digest
        if averages is not None:
            moving = {name: x for name, x in averages.items() if name not in frozen}
            writer.write(to / AVERAGE, partial(write_weights, moving))
        if frozen and not self.frozen:
            path = to.with_name("frozen" + WRITING)
            writer.write(path, partial(write_weights, frozen))
            if digest := writer.digests.pop(path.name, None):
                name = f"frozen-{digest[:12]}.safetensors"
                writer.attempt(lambda: os.replace(path, path.with_name(name)))
                self.frozen = {f"../{name}": digest}
        writer.digests |= self.frozen
        text = json.dumps(state.shared(), indent=1)
        writer.write(to / STATE, lambda path: path.write_text(text))

    def _publish(self, name: str, state: TrainState, digests: dict[str, str]) -> None:
        """Publish the checkpoint that has been written, then remove old ones."""
        folder, root = self.folder, self.folder / FOLDER
        before, new = candidates(root), root / name
        publish(root / (name + WRITING) / CHECKSUMS, json.dumps(digests, indent=1).encode())
        os.replace(root / (name + WRITING), new)
        sync_folder(root)
        for file in (WEIGHTS, AVERAGE):
            if (folder / (file + WRITING)).is_file():
                os.replace(folder / (file + WRITING), folder / file)
                evaluated = file
            else:  # of an earlier run, or from before a change of settings
                (folder / file).unlink(missing_ok=True)
        best = state.best.get("step") if self.settings.keep_best else None
        if best == state.step:
            shutil.copyfile(folder / evaluated, folder / (BEST + WRITING))
            os.replace(folder / (BEST + WRITING), folder / BEST)
        sync_folder(folder)
        publish(root / LATEST, name.encode())
        # What is newer than the one before was left over by a resume from an older one.
        every, kept = steps(root), {new, *before[: self.settings.keep - 1]}
        kept |= {*[path for path in (new, *before) if every[path] == best][:1]}
        for path in every.keys() - kept:
            shutil.rmtree(path, ignore_errors=True)

    def diverged(self, what: str, state: TrainState) -> str:
        """The error message of a diverged run: its first bad step and the last good checkpoint."""
        first = state.step - max(0, state.skipped_in_row - 1)
        good = candidates(self.folder / FOLDER)
        kept = f"the last good checkpoint is {good[0]}" if good else "no checkpoint is before it"
        return (
            f"the run has diverged: {what}; the first bad step is {first}, {kept}. Look at the "
            f"samples that {self.folder / 'metrics.jsonl'} names, or start over with a lower --lr"
        )

    def closing_lines(self, state: TrainState) -> list[str]:
        """To be printed at the end. Raises `UserError` if there is no checkpoint of it."""
        if not self.holds(state):
            problem = f"the last checkpoint could not be written ({self.error})"
            raise UserError(f"{problem}: mend that, and start {self.folder} again")
        lines, best = [], state.best
        if state.out_of_patience(self.settings.patience):
            worse = f"{state.worse_in_row} evaluations in a row gave no better result"
            lines.append(f"ended at step {state.step}: {worse}")
        over = f" ({best['pairs']} pairs, chance {best['chance']:.3f})"
        lines.append(f"best {best['metric']} {best['value']:.3f} at step {best['step']}{over}")
        return [*lines, f"written to {self.folder}"]
