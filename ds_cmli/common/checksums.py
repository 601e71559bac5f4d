"""Digests of files."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import IO

READ_BYTES = 1 << 20


def of_file(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        feed(digest.update, file)
    return digest.hexdigest()


def feed(update: Callable[[bytes], object], file: IO[bytes], size: float = math.inf) -> None:
    """Give a digest's `update` the rest of a file, or its next `size` bytes, in blocks."""
    while block := file.read(int(min(size, READ_BYTES))):
        update(block)
        size -= len(block)
