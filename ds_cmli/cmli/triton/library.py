"""Triton, or where it is not installed the names that the kernels' files read of it.

With a CPU build of torch nothing brings it, and nothing needs more: a prediction of the memory on a
GPU chooses tiles and allocates as those files say, and starts no kernel.
"""

from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch.torch_version import TorchVersion

# The Triton that the CUDA builds of PyTorch 2.13 and later require. Earlier ones differ in nothing
# that a prediction asks.
REQUIRED = {"2.13": "3.7.1", "2.14": "3.8.0", "2.15": "3.9.0"}


def required(pytorch: str) -> str:
    """The version that the CUDA build of a version of PyTorch requires, as far as is known."""
    version = REQUIRED["2.13"]
    for release, brought in REQUIRED.items():
        if TorchVersion(pytorch) >= release:
            version = brought
    return version


if TYPE_CHECKING or find_spec("triton") is not None:
    import triton
    import triton.language as tl
else:

    def _unchanged(kernel: Callable | None = None, **_: object) -> Callable:
        return _unchanged if kernel is None else kernel

    triton = SimpleNamespace(jit=_unchanged, __version__=required(torch.__version__))
    tl = SimpleNamespace(constexpr=lambda value: value)
