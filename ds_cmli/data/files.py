"""Safe reading of untrusted files."""

import os
import stat
from pathlib import Path

from ds_cmli.data.bad import Refused


def most_bytes(max_pixels: int) -> int:
    """An upper limit for the file size of a picture: 16 bytes per pixel, and 1 MiB for metadata."""
    return 16 * max_pixels + 2**20


def read_file(path: Path, root: str, most: int, follow_symlinks: bool) -> bytes:
    """The content of a regular file.

    Args:
        root: the real path of the data folder; files outside of it are refused unless `follow_symlinks`.
        most: the maximum size in bytes; a longer file is refused.

    Raises:
        Refused: the file is not allowed, not regular, or too long.
        OSError: it cannot be read.
    """
    if not follow_symlinks and not inside(path, root):
        raise Refused("a symlink out of the data folder: data.follow_symlinks=true allows it")
    # Checked before opening, because opening a device can have side effects, and again on the opened file.
    if not stat.S_ISREG(path.stat().st_mode):
        raise Refused("no regular file")
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise Refused("no regular file")
        check_bytes(status.st_size, most)
        return file.read()


def check_bytes(size: int, most: int) -> None:
    """Raise `Refused` if a picture's file is longer than any picture could be."""
    if size > most:
        raise Refused(f"{size:,} bytes, more than a picture of data.max_pixels takes")


def inside(path: Path, root: str) -> bool:
    """Whether the file lies in `root` once all symlinks are followed."""
    return Path(os.path.realpath(path)).is_relative_to(root)
