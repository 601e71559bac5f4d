"""Compiles and switches the small library of `guard.cpp`."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch.torch_version import TorchVersion

from ds_cmli.common import native
from ds_cmli.common.errors import UserError

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
    options = ["-std=c++20", f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"]
    options += [f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"]
    try:
        return ctypes.CDLL(str(native.library(SOURCE, options, str(installed))))
    except OSError as reason:  # such as a file system without programs
        raise UserError(f"{reason}: set DS_CMLI_CACHE to another folder") from None
    except UserError as reason:
        raise UserError(f"a prediction needs g++ 10 or later: {reason}") from None


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
