"""Triton, or where it is not installed the names that the kernels' files read of it.

With a CPU build of torch nothing brings it, and nothing needs more: a prediction of the memory on a
GPU chooses tiles and allocates as those files say, and starts no kernel.
"""

from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING

# Where neither a GPU nor Triton is here: the version that the CUDA build of PyTorch 2.13 requires.
ASSUMED = "3.7.1"

if TYPE_CHECKING or find_spec("triton") is not None:
    import triton
    import triton.language as tl
else:

    def _unchanged(kernel: Callable | None = None, **_: object) -> Callable:
        return _unchanged if kernel is None else kernel

    triton = SimpleNamespace(jit=_unchanged, __version__=ASSUMED)
    tl = SimpleNamespace(constexpr=lambda value: value)
