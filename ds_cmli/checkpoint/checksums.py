"""Durable, verified files: written with a checksum, synced to disk, and published atomically by a rename.

`checksums.json` lists each file of a folder with its size and SHA-256, and begins with its own SHA-256.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

NAME = "checksums.json"
FORMER_NAME = "manifest.json"  # the name in older checkpoints
READ_BYTES = 1 << 20


class _Hashing:
    """A file for writing that counts and hashes the bytes on their way to the disk, which could corrupt them."""

    def __init__(self, file: IO[bytes]):
        self.file, self.bytes, self.digest = file, 0, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data) -> int:
        self.digest.update(data)
        self.bytes += memoryview(data).nbytes
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        return memoryview(data).nbytes

    def flush(self) -> None:
        self.file.flush()


def write_file(path: Path, write: Callable[[Any], Any]) -> dict[str, Any]:
    """Create `path` by `write(file)`, sync it to disk and return its entry for `checksums.json`. Raises OSError."""
    with open(path, "wb") as file:
        hashing = _Hashing(file)
        try:
            write(hashing)
        except RuntimeError:  # PyTorch's writer raises this in place of the OSError of a full disk
            raise hashing.error or OSError("not written") from None
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": hashing.bytes, "sha256": hashing.digest.hexdigest()}


def publish(path: Path, data: bytes) -> None:
    """Replace `path` atomically and durably by a file of these bytes: a reader sees either the old or the new one."""
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


def write(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Write `checksums.json` of `folder`; `files` are the entries that `write_file` returned, by file name."""
    write_file(folder / NAME, lambda file: file.write(_text(files).encode()))
    sync_folder(folder)


def _text(files: dict[str, dict[str, Any]]) -> str:
    body = json.dumps(files, indent=1, sort_keys=True)
    return json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest()}) + "\n" + body + "\n"


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The entries of `checksums.json` by file name; raises ValueError, which says what is wrong with it."""
    try:
        former = folder / FORMER_NAME
        text = (former if former.is_file() else folder / NAME).read_text()
        files = json.loads(text.partition("\n")[2])
    except FileNotFoundError:
        raise ValueError(f"{NAME} is missing") from None
    except (OSError, ValueError):
        raise ValueError(f"{NAME} cannot be read") from None
    if not isinstance(files, dict) or _text(files) != text:
        raise ValueError(f"{NAME} does not match its own checksum")
    return files


def problem(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with `folder`; None if all files agree with `checksums.json`.

    Only every `parts`-th file is read, starting with number `part`, so that ranks can share the work.
    """
    try:
        files = read(folder)
    except ValueError as error:
        return str(error)
    for name, expected in sorted(files.items())[part::parts]:
        try:
            actual = _describe(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if actual["bytes"] != expected["bytes"]:
            return f"{name} has {actual['bytes']} bytes instead of {expected['bytes']}"
        if actual != expected:
            return f"{name} does not match its checksum"
    return None


def _describe(path: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}
