"""The folder in which files stay from one run to the next."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from ds_cmli.common import checksums
from ds_cmli.common.errors import UserError

DIGEST_BYTES = 32


def cache_folder() -> Path:
    """The first that is set of $DS_CMLI_CACHE and $XDG_CACHE_HOME/ds-cmli, or ~/.cache/ds-cmli.

    Raises `UserError` where that is in a home folder, and the user has none.
    """
    own = os.environ.get("DS_CMLI_CACHE")
    folder = Path(own or os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        folder = folder.expanduser().absolute()
    except RuntimeError:
        raise UserError(f"no home folder for {folder}: set DS_CMLI_CACHE") from None
    return folder if own else folder / "ds-cmli"


@contextmanager
def locked(folder: Path, name: str, contents: str) -> Iterator[None]:
    """Hold a lock while `contents` is written to a folder of the cache, which is made.

    One process does so, the others wait. Raises `UserError` if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / name):
            yield
    # FileLock raises the latter on file systems without locks.
    except (OSError, NotImplementedError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"{contents} cannot be written to {folder} ({why}): "
            "free some space there, or set DS_CMLI_CACHE to another folder"
        ) from None


def seal(path: Path) -> None:
    """Append the digest of a file's content, by which `is_sealed` finds later damage."""
    with open(path, "r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(_digest(path, file.tell()))


def is_sealed(path: Path) -> bool:
    """Whether a file can be read and is as it was sealed."""
    with suppress(OSError), open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END) - DIGEST_BYTES
        return size >= 0 and file.seek(size) == size and file.read() == _digest(path, size)
    return False


def _digest(path: Path, size: int) -> bytes:
    """The digest of a file's first `size` bytes."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    with open(path, "rb") as file:
        checksums.feed(digest.update, file, size)
    return digest.digest()
