"""The folder in which files stay from one run to the next."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from ds_cmli.common.errors import blame


def cache_folder() -> Path:
    """$DS_CMLI_CACHE, or ds-cmli in $XDG_CACHE_HOME or ~/.cache."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ds-cmli"
    return Path(os.environ.get("DS_CMLI_CACHE") or usual).expanduser().absolute()


@contextmanager
def locked(folder: Path, name: str, contents: str) -> Iterator[None]:
    """Hold a lock while `contents` is written to a folder of the cache, which is made.

    One process does so, the others wait. Raises `UserError` if it cannot be written.
    """
    with blame(f"{contents} cannot be written to {folder}: free some space, or set DS_CMLI_CACHE"):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / name):
            yield
