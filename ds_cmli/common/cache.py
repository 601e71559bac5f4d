"""The folder in which files stay from one run to the next, compiled C++ among them."""

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from ds_cmli.common import checksums
from ds_cmli.common.errors import UserError

DIGEST_BYTES = 32


def cache_folder() -> Path:
    """The first that is set of $DS_CMLI_CACHE and $XDG_CACHE_HOME/ds-cmli, or ~/.cache/ds-cmli."""
    if os.environ.get("DS_CMLI_CACHE"):
        return Path(os.environ["DS_CMLI_CACHE"]).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "ds-cmli"


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


def library(source: Path, options: Sequence[str], also: str = "") -> Path:
    """The shared library of a file, compiled with these options if it is not whole in the cache.

    It may include the headers of its folder.

    Args:
        also: what else it depends on, such as the version of a library.

    Raises:
        UserError: there is no compiler, it does not compile the file, or the cache is not writable.
    """
    sources = [source, *sorted(source.parent.glob("*.h"))]
    text = "\n".join([*map(Path.read_text, sources), *options, also])
    folder = cache_folder() / "native"
    built = folder / f"{source.stem}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.so"
    if not is_sealed(built):
        with locked(folder, ".lock", f"the library of {source.name}"):
            if not is_sealed(built):
                _compile(source, options, built)
    return built


def _compile(source: Path, options: Sequence[str], built: Path) -> None:
    named = os.environ.get("CXX") or shutil.which("c++") or "g++"
    compiler = shlex.split(named)  # such as "ccache g++"
    if not shutil.which(compiler[0]):
        raise UserError(
            f"{source.name} is compiled at its first use, which finds no compiler {named!r}: "
            "install g++, or set CXX"
        )
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        out = Path(folder) / built.name
        command = [*compiler, "-shared", "-fPIC", str(source), "-o", str(out), *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise UserError(f"{named} cannot compile {source}: {(errors or ['?'])[0]}")
        seal(out)  # what follows the sections of a library is not loaded
        out.replace(built)
