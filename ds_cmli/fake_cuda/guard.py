"""Gives any build of PyTorch a device of type cuda that is not there, by two small libraries.

That of `guard.cpp` is in place of what a build with CUDA has for a GPU, and that of `no_driver.cpp`
in place of NVIDIA's driver, so that a GPU of this machine is not touched, whoever asks for it.
"""

import ctypes
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from packaging.version import Version

from ds_cmli.common import native
from ds_cmli.common.errors import UserError

SOURCE = Path(__file__).parent / "guard.cpp"
NO_DRIVER = SOURCE.with_name("no_driver.cpp")
DRIVER = ("libcuda.so.1", "libnvidia-ml.so.1")
OLDEST = (2, 8)  # of torch

loaded: ctypes.CDLL | None = None  # the library of guard.cpp


def load() -> None:
    """Load the libraries, which are compiled at the first use of each version of torch.

    It has to be called before torch is imported, as torch looks for a device's hooks only once, and
    asks for the driver.

    Raises:
        UserError: there is no compiler, or this version of torch is not known.
    """
    global loaded
    drivers = [native.library(NO_DRIVER, [f"-Wl,-soname,{name}"]) for name in DRIVER]
    try:
        for driver in drivers:
            ctypes.CDLL(str(driver))
        loaded = ctypes.CDLL(str(library()), mode=ctypes.RTLD_GLOBAL)
    except OSError as reason:  # such as a file system without programs
        raise UserError(f"{reason}: set DS_CMLI_CACHE to another folder") from None


def library() -> Path:
    """Compile the library of `guard.cpp` into the cache if it is not there."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise UserError("PyTorch is not installed in this environment")
    torch, installed = Path(spec.origin).parent, version("torch")
    if Version(installed).release < OLDEST:
        raise UserError(f"torch is {installed}: give 2.8 or a later one")
    include = torch / "include"
    options = ["-std=c++20", f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"]
    options += [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}"]
    try:
        return native.library(SOURCE, options, installed)
    except UserError as reason:
        raise UserError(f"torch is {installed}: {reason}") from None
