"""Compiles and switches the small library of `guard.cpp`."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch.torch_version import TorchVersion

from ds_cmli.cmli.cpu import compiled
from ds_cmli.common import UserError, blame

SOURCE = Path(__file__).parent / "guard.cpp"
OLDEST, NEXT = "2.10", "2.16"  # of PyTorch: what is between is known to answer alike


@cache
def library() -> ctypes.CDLL:
    """Compile the library into the cache if it is not there, and load it.

    Raises:
        UserError: there is no compiler, or this version of PyTorch is not known.
    """
    installed = TorchVersion(torch.__version__)
    if installed < OLDEST or installed >= NEXT:
        raise UserError(f"torch is {installed}: a prediction knows {OLDEST} to before {NEXT}")
    root = Path(torch.__file__).parent
    include, lib = root / "include", root / "lib"
    flags = ["-std=c++20", f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"]
    flags += [f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"]
    flags += [f"-DFOR_TORCH={installed}"]  # another version has another library
    with blame("a prediction compiles with g++ 10 or later, into the folder DS_CMLI_CACHE"):
        return compiled(SOURCE, flags)


@contextmanager
def answering() -> Iterator[None]:
    """Inside, PyTorch's C++ finds the GPU of the library, and autograd stays in this thread."""
    ours = library()
    ours.fake_cuda_on()
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        ours.fake_cuda_off()
