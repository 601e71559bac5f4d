"""Opening files that nobody vouches for."""

import os
import stat
from pathlib import Path

from ds_cmli.data.bad import Refused


def most_bytes(max_pixels: int) -> int:
    """No picture of so many pixels takes more: 16 bytes a pixel, and some for what describes it."""
    return 16 * max_pixels + 2**20


def read_file(path: Path, root: str, most: int, follow_symlinks: bool) -> bytes:
    """What a regular file holds.

    Args:
        root: the data folder, without symlinks; files outside of it are refused unless `follow_symlinks`.
        most: bytes; a longer file is refused.

    Raises:
        Refused, OSError.
    """
    if not follow_symlinks and not inside(path, root):
        raise Refused("a symlink out of the data folder: data.follow_symlinks=true allows it")
    # Asked before it is opened, which devices may answer to, and again of what has been opened.
    if not stat.S_ISREG(path.stat().st_mode):
        raise Refused("no regular file")
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise Refused("no regular file")
        check_bytes(status.st_size, most)
        return file.read()


def check_bytes(size: int, most: int) -> None:
    """Raises `Refused` where a picture's file is longer than any picture could be."""
    if size > most:
        raise Refused(f"{size:,} bytes, more than a picture of data.max_pixels takes")


def inside(path: Path, root: str) -> bool:
    """Whether the file lies in `root` with all symlinks followed."""
    return Path(os.path.realpath(path)).is_relative_to(root)
