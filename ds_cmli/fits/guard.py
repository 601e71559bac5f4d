"""Gives a build of PyTorch without CUDA a device of type cuda, by the library of `guard.cpp`."""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from ds_cmli.common.cache import cache_folder, locked
from ds_cmli.common.errors import UserError

SOURCE = Path(__file__).parent / "guard.cpp"


loaded: ctypes.CDLL | None = None  # the library


def load() -> None:
    """Load the library, which is compiled at the first use of each version of torch.

    It has to be called before torch is imported, as torch looks for a device's hooks only once.

    Raises:
        UserError: there is no compiler, or this build of torch has CUDA.
    """
    global loaded
    loaded = ctypes.CDLL(str(library()), mode=ctypes.RTLD_GLOBAL)


def library() -> Path:
    """Compile the library into the cache if it is not there."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise UserError("fits needs PyTorch, which is not installed in this environment")
    torch = Path(spec.origin).parent
    if (torch / "lib" / "libtorch_cuda.so").exists():
        raise UserError(
            f"torch is {version('torch')}, a build with CUDA: fits runs with the CPU build so far: "
            "install it in an environment of its own (pip --index-url "
            "https://download.pytorch.org/whl/cpu), or give --engine null"
        )
    text = SOURCE.read_text() + version("torch") + str(torch)
    folder = cache_folder() / "fits"
    built = folder / f"guard-{hashlib.sha256(text.encode()).hexdigest()[:12]}.so"
    if not built.exists():
        with locked(folder, ".lock", "the library of fits"):
            if not built.exists():
                _compile(torch, built)
    return built


def _compile(torch: Path, built: Path) -> None:
    named = os.environ.get("CXX") or shutil.which("c++") or "g++"
    compiler = shlex.split(named)  # such as "ccache g++"
    if not shutil.which(compiler[0]):
        raise UserError(
            f"fits compiles 80 lines of C++ once, and finds no compiler {named!r}: install g++, or "
            "set CXX"
        )
    include = torch / "include"
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        out = Path(folder) / built.name
        command = [*compiler, "-shared", "-fPIC", "-std=c++20", str(SOURCE), "-o", str(out)]
        command += [f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"]
        command += [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise UserError(f"{named} cannot compile {SOURCE}: {(errors or ['?'])[0]}")
        out.replace(built)
