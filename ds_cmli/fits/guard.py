"""Gives a build of PyTorch without CUDA a device of type cuda, by the library of `guard.cpp`."""

import ctypes
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from ds_cmli.common import native
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
    include = torch / "include"
    options = ["-std=c++20", f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"]
    options += [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}"]
    return native.library(SOURCE, options, version("torch"))
