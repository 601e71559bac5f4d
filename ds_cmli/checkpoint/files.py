"""The files of checkpoints: durable, listed with their SHA-256 in `checksums.json`, free of code.

`checkpoint/stepN/` is one checkpoint and `checkpoint/latest` names the newest that was published.
What is still being written has a name that ends in `.writing`. `stepN.K` is a later checkpoint of
the same step. Weights that are not trained lie in `checkpoint/frozen-DIGEST.safetensors`, once for
all checkpoints, which list that file as `../frozen-DIGEST.safetensors`.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors import SafetensorError
from typing_extensions import TypedDict

from ds_cmli.common import checksums
from ds_cmli.common.errors import first_line
from ds_cmli.common.patches import environment

FOLDER, LATEST, CHECKSUMS, WRITING = "checkpoint", "latest", "checksums.json", ".writing"
# All that PyTorch's loader builds from a file besides tensors and plain values.
DEEPSPEED_CLASSES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


class Entry(TypedDict):
    """What `checksums.json` says about a file."""

    bytes: int
    sha256: str


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


def candidates(root: Path) -> list[str]:
    """The checkpoints to try: the one that `latest` names and older ones, newest first; or all."""
    known = names(root)
    try:
        newest = (root / LATEST).read_text().strip()
    except (OSError, UnicodeDecodeError):
        newest = ""
    if newest in known:
        known = known[: known.index(newest) + 1]
    return known[::-1]


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_incomplete(folder: Path) -> None:
    """Remove what a save that was interrupted has left in the run's folder."""
    for path in (*folder.glob("*" + WRITING), *(folder / FOLDER).glob("*" + WRITING)):
        remove(path)


def write(path: Path, write_to: Callable[[Path], object]) -> Entry:
    """Make a file by `write_to(path)`, and sync it to disk. Raises OSError."""
    try:
        write_to(path)
    except (RuntimeError, SafetensorError) as error:  # in place of a full disk's OSError
        raise OSError(first_line(error)) from error
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return describe(path)


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


def describe(path: Path) -> Entry:
    """Read a file and return its entry. Raises OSError."""
    return {"bytes": path.stat().st_size, "sha256": checksums.of_file(path)}


def write_checksums(folder: Path, entries: dict[str, Entry]) -> None:
    """Write `checksums.json`, whose first line is the SHA-256 of the others."""
    body = json.dumps(entries, indent=1, sort_keys=True) + "\n"
    text = f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}"
    write(folder / CHECKSUMS, lambda file: file.write_text(text))
    sync_folder(folder)


def read_checksums(folder: Path) -> dict[str, Entry]:
    """Raises ValueError with what is wrong."""
    try:
        digest, _, body = (folder / CHECKSUMS).read_text().partition("\n")
    except FileNotFoundError:
        raise ValueError(f"{CHECKSUMS} is missing") from None
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"{CHECKSUMS} cannot be read") from None
    if hashlib.sha256(body.encode()).hexdigest() != digest:
        raise ValueError(f"{CHECKSUMS} does not match its own checksum")
    return json.loads(body)


def damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint; None if all files agree with `checksums.json`.

    Only every `parts`-th file is read, from number `part` on, so that ranks can share the work.
    """
    try:
        entries = read_checksums(folder)
    except ValueError as error:
        return str(error)
    for name, expected in sorted(entries.items())[part::parts]:
        try:
            actual = describe(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if actual != expected:
            sizes = f"has {actual['bytes']} bytes instead of {expected['bytes']}"
            equal = actual["bytes"] == expected["bytes"]
            return f"{name} {'does not match its checksum' if equal else sizes}"
    return None


class CheckpointWriter(TorchCheckpointEngine):
    """Writes DeepSpeed's files durably, and records errors instead of raising them.

    If one rank left DeepSpeed's `save_checkpoint`, the others would wait in it for ever.
    """

    def __init__(self):
        super().__init__()
        self.files: dict[str, Entry] = {}
        self.error: Exception | None = None  # why a file was not written

    def makedirs(self, path, exist_ok=False):  # made by rank 0
        pass

    def save(self, state_dict, path):
        self.write(Path(path), partial(torch.save, state_dict))

    def load(self, path, map_location=None):
        return torch.load(path, map_location=map_location, weights_only=True)

    def write(self, path: Path, write_to: Callable[[Path], object]) -> None:
        if self.error is None:
            try:
                self.files[path.name] = write(path, write_to)
            except OSError as error:
                self.error = error


@contextmanager
def no_code() -> Iterator[None]:
    """A context in which no library runs code from files that it reads, even if it asks for that.

    It does not nest.
    """
    force = environment({"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"})
    with force, torch.serialization.safe_globals(DEEPSPEED_CLASSES):
        yield
