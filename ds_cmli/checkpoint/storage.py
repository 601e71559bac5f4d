"""Files of a run's folder: their names, durable writing, and damage.

`checkpoint/stepN/` holds DeepSpeed's files, `state.json` and `rank-R.pt` (`TrainState`), the
averages as `model.ema.safetensors`, and `checksums.json`; `stepN.K` is a later one of the same
step. `checkpoint/latest` names the newest, and `checkpoint/frozen-DIGEST.safetensors` has the
weights that are not trained, once for all checkpoints. A file or folder that is still being written
has a name that ends in `.writing`.
"""

import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from safetensors import SafetensorError

from ds_cmli.distributed import process_group as distributed
from ds_cmli.errors import one_line
from ds_cmli.files import read_json, sha256

CHECKPOINTS = "checkpoint"  # the folder of all checkpoints in a run's folder
LATEST = "latest"
CHECKSUMS = "checksums.json"
WRITING = ".writing"
METRICS = "metrics.jsonl"  # in the run's folder
RUN_RECORD = "run.json"  # in the run's folder


# --- checkpoints in a folder


def root_of(resume: str) -> Path:
    """Return the folder of checkpoints that --resume PATH means.

    PATH is a run's folder, this folder itself, or a checkpoint in it.
    """
    path = Path(resume).absolute()
    if (path / CHECKSUMS).is_file():
        return path.parent
    return path if path.name == CHECKPOINTS else path / CHECKPOINTS


def checkpoint_steps(root: Path) -> dict[Path, int]:
    """Return the checkpoints in `root` and their steps, oldest first."""
    numbered = []
    for path in root.glob("step*"):
        match = re.fullmatch(r"step(\d+)(?:\.(\d+))?", path.name)
        if match and path.is_dir():
            step, repetition = match.groups(default="0")
            numbered.append((int(step), int(repetition), path))
    return {path: step for step, _, path in sorted(numbered)}


def newest_first(root: Path) -> list[Path]:
    """Return the checkpoints to try in turn, from the one that `latest` names if that is there."""
    checkpoints = [*checkpoint_steps(root)]
    pointer = root / LATEST
    if pointer.is_file():
        with suppress(OSError, ValueError):
            newest = root / pointer.read_text().strip()
            checkpoints = checkpoints[: checkpoints.index(newest) + 1]
    return checkpoints[::-1]


def find_damage(checkpoint: Path) -> str | None:
    """Return the name of a damaged file and the damage; None if all agree with `checksums.json`."""
    name = CHECKSUMS
    try:
        _check_is_file(checkpoint / CHECKSUMS)
        for name, digest in read_json(checkpoint / CHECKSUMS).items():
            _check_is_file(checkpoint / name)
            if sha256(checkpoint / name) != digest:
                raise ValueError("another content")
    except (OSError, ValueError, RecursionError) as error:
        return f"{name} (by {CHECKSUMS}): {getattr(error, 'strerror', None) or error}"
    return None


def _check_is_file(path: Path) -> None:
    """Raise OSError for a pipe or a device, which may be read for ever."""
    if path.exists() and not path.is_file():
        raise OSError("it is no file")


# --- writing


def sync_and_hash(path: Path) -> str:
    """Sync a file to disk and return its SHA-256. Raises OSError."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return sha256(path)


def publish(path: Path, content: bytes) -> None:
    """Replace `path` atomically and durably: a reader sees the old or the new file."""
    unpublished = path.with_name(path.name + WRITING)
    unpublished.write_bytes(content)
    sync_and_hash(unpublished)
    os.replace(unpublished, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk; otherwise a power failure can undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_incomplete(folder: Path) -> None:
    """Remove what an interrupted save has left in the run's folder."""
    for path in (*folder.glob("*" + WRITING), *(folder / CHECKPOINTS).glob("*" + WRITING)):
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)


def load_tensors(path: Path, map_location: Any = "cpu") -> Any:
    """Load a file of `torch.save`, and run no code that it may hold."""
    return torch.load(path, map_location=map_location, weights_only=True)


class CheckpointWriter(TorchCheckpointEngine):
    """Writes files, DeepSpeed's too, durably, and records the first error instead of raising it.

    A thread syncs a file to disk and hashes it while the next one is written. If one rank left
    DeepSpeed's `save_checkpoint` with an error, the others would wait in it for ever.
    """

    def __init__(self):
        super().__init__()
        self.error: str | None = None
        self._digests: dict[str, Future[str]] = {}  # by the names of the files
        self._thread = ThreadPoolExecutor(1)

    def makedirs(self, path, exist_ok=False):
        pass  # it is there

    def save(self, state_dict, path):
        def save_tensors(path: Path) -> None:
            with open(path, "wb") as file:  # Python's error names the reason, PyTorch's does not
                torch.save(state_dict, file)

        self.write(Path(path), save_tensors)

    def load(self, path, map_location=None):
        return load_tensors(path, map_location)

    def write(self, path: Path, write_to: Callable[[Path], object]) -> None:
        """Make a file by `write_to(path)`, in the way of `attempt`."""
        self.attempt(lambda: write_to(path))
        if self.error is None:
            self._digests[path.name] = self._thread.submit(sync_and_hash, path)

    def attempt(self, action: Callable[[], object]) -> None:
        """Run `action` unless there was an error before, and record its error."""
        if self.error is not None:
            return
        try:
            action()
        except OSError as error:
            self.error = one_line(error)
        except (RuntimeError, SafetensorError) as error:
            # PyTorch fails again when it closes the file, and its message hides that of the disk.
            disk_error = error.__context__
            self.error = one_line(disk_error if isinstance(disk_error, OSError) else error)

    def take_digest(self, name: str) -> str | None:
        """Return the SHA-256 of a file once it is on disk, and leave the file out of `gather`.

        None if there was an error.
        """
        digest = self._digests.pop(name, None)
        if digest is not None:
            self.attempt(digest.result)
        return digest.result() if digest is not None and self.error is None else None

    def gather(self) -> dict[str, str | None]:
        """Return the files of all ranks with their SHA-256, once all are on disk.

        `error` is then that of the first rank that has one. Collective.
        """
        digests = {name: self.take_digest(name) for name in [*self._digests]}
        self._thread.shutdown()
        gathered = distributed.gather_objects((digests, self.error))  # collective
        self.error = None
        for rank, (rank_digests, rank_error) in enumerate(gathered):
            digests |= rank_digests
            if rank_error is not None and self.error is None:
                self.error = f"rank {rank}: {rank_error}"
        return digests
