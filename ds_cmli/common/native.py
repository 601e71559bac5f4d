"""C++ that is compiled at its first use, into the cache."""

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ds_cmli.common.cache import cache_folder, is_sealed, locked, seal
from ds_cmli.common.errors import UserError


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
    named = os.environ.get("CXX", "").strip() or shutil.which("c++") or "g++"
    compiler = [named]
    with suppress(ValueError):  # a quotation that does not end
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
        if done.returncode or not out.exists():
            lines = done.stderr.splitlines()
            errors = [line for line in lines if "error" in line] or [*lines[-1:], "no message"]
            raise UserError(
                f"{named} cannot compile {source} ({errors[0]}): CXX names another compiler"
            )
        seal(out)  # what follows the sections of a library is not loaded
        out.replace(built)
