"""Files of any kind: JSON, hashes, trials of writing, and the cache."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from ds_cmli.errors import UserError, blame

JsonObject = dict[str, Any]
Section = Mapping[str, Any]  # a part of a JSON that is only read


def read_json(path: Path) -> JsonObject:
    """Return the object in a JSON file. Raises OSError, ValueError and RecursionError."""
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_writable(name: str) -> None:
    """Raise `UserError` if a file cannot be written, before the work whose result it will hold."""
    existed = os.path.lexists(name)
    try:
        with open(name, "a"):
            pass
        if not existed:
            os.remove(name)
    except OSError as error:
        raise UserError(f"cannot write {name!r}: {error.strerror}") from None


def cache_folder() -> Path:
    """Return $DS_CMLI_CACHE, or ds-cmli in $XDG_CACHE_HOME or ~/.cache."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ds-cmli"
    return Path(os.environ.get("DS_CMLI_CACHE") or usual).expanduser().absolute()


@contextmanager
def locked(folder: Path, name: str, contents: str) -> Iterator[None]:
    """Hold a lock while `contents` is written to a folder of the cache; other processes wait."""
    with blame(f"{contents} cannot be written to {folder}: free some space, or set DS_CMLI_CACHE"):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / name):
            yield
