"""Durable, verified files: written with a checksum, synced to disk, and published by a rename.

`checksums.json` lists each file of a folder with its size and SHA-256, and begins with its own
SHA-256. DeepSpeed's files go through `CheckpointWriter`, which records errors and does not raise
them: if one rank left DeepSpeed's `save_checkpoint`, the others would wait in it forever. Files are
read with PyTorch's `weights_only` loader, which runs no code from a file; besides tensors and plain
values it builds only the four DeepSpeed classes named here.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TypedDict

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from ds_cmli.common import checksums
from ds_cmli.common.json_text import parse
from ds_cmli.common.patches import environment
from ds_cmli.models.weights import not_finite

CHECKSUMS = "checksums.json"
DEEPSPEED_CLASSES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


class FileEntry(TypedDict):
    """What `checksums.json` says about a file."""

    bytes: int
    sha256: str


class NotFinite(Exception):
    """A tensor to be saved has NaN or inf: the run has diverged, and keeps the last checkpoint."""


class Hashing:
    """A file for writing that counts and hashes the bytes on their way to the disk."""

    def __init__(self, file: IO[bytes]):
        self.file, self.bytes, self.digest = file, 0, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        self.digest.update(data)
        size = memoryview(data).nbytes
        self.bytes += size
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        return size

    def flush(self) -> None:
        self.file.flush()


def write_file(path: Path, write: Callable[[Hashing], object]) -> FileEntry:
    """Create `path` by `write(file)`, sync it to disk and return its checksum. Raises OSError."""
    with open(path, "wb") as file:
        hashing = Hashing(file)
        try:
            write(hashing)
        except RuntimeError:  # PyTorch's writer raises this in place of the OSError of a full disk
            raise hashing.error or OSError("not written") from None
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": hashing.bytes, "sha256": hashing.digest.hexdigest()}


def publish(path: Path, data: bytes) -> None:
    """Replace `path` atomically and durably: a reader sees the old or the new file."""
    beside = path.with_name(path.name + ".writing")
    write_file(beside, lambda file: file.write(data))
    os.replace(beside, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk; otherwise a power failure can undo a rename."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_checksums(folder: Path, entries: Mapping[str, FileEntry]) -> None:
    """Write `checksums.json` of `folder`; `entries` are those of `write_file`, by name."""
    write_file(folder / CHECKSUMS, lambda file: file.write(_text(entries).encode()))
    sync_folder(folder)


def _text(entries: Mapping[str, FileEntry]) -> str:
    body = json.dumps(entries, indent=1, sort_keys=True)
    return json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest()}) + "\n" + body + "\n"


def read_checksums(folder: Path) -> dict[str, FileEntry]:
    """Read `checksums.json`: entries by file name. Raises ValueError with what is wrong."""
    try:
        text = (folder / CHECKSUMS).read_text()
        entries = parse(text.partition("\n")[2], dict)
    except FileNotFoundError:
        raise ValueError(f"{CHECKSUMS} is missing") from None
    except (OSError, ValueError):
        raise ValueError(f"{CHECKSUMS} cannot be read") from None
    if _text(entries) != text:
        raise ValueError(f"{CHECKSUMS} does not match its own checksum")
    return entries


def problem(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with `folder`; None if all files agree with `checksums.json`.

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
        if actual["bytes"] != expected["bytes"]:
            return f"{name} has {actual['bytes']} bytes instead of {expected['bytes']}"
        if actual != expected:
            return f"{name} does not match its checksum"
    return None


def entry_of(*pieces: bytes | memoryview) -> FileEntry:
    """The entry of a file with this content."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return {"bytes": sum(memoryview(x).nbytes for x in pieces), "sha256": digest.hexdigest()}


def describe(path: Path) -> FileEntry:
    """Read a file and return its entry. Raises OSError."""
    return {"bytes": path.stat().st_size, "sha256": checksums.of_file(path)}


class CheckpointWriter(TorchCheckpointEngine):
    """Writes DeepSpeed's checkpoint files in place of its `TorchCheckpointEngine`.

    Attributes: `files`, each written file's size and checksum; `error`, why one was not written.
    """

    def __init__(self):
        super().__init__()
        self.files: dict[str, FileEntry] = {}
        self.error: Exception | None = None

    def makedirs(self, path, exist_ok=False):
        try:
            super().makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.error = error

    def save(self, state_dict, path):
        self.write_tensors(state_dict, Path(path))

    def load(self, path, map_location=None):  # `no_code` allows DeepSpeed's classes
        return torch.load(path, map_location=map_location, weights_only=True)

    def write_tensors(self, value: object, path: Path) -> None:
        """`torch.save` that records the file, or the error; only finite values are written."""
        if self.error is not None:
            return
        bad = not_finite(value)
        if bad is not None:
            self.error = NotFinite(f"{bad} in {path.name}")
            return
        try:
            self.files[path.name] = write_file(path, partial(torch.save, value))
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
