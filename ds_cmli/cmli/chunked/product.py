"""The matrix product of a tile, by the library that is fastest on this processor."""

from pathlib import Path

import torch
from torch import Tensor


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


# On AMD processors oneDNN's fp32 product is about twice as fast as MKL's, which torch.mm takes; on
# Intel's MKL leads.
ONEDNN = torch.backends.mkldnn.is_available() and _is_amd()


def product(text: Tensor, image: Tensor) -> Tensor:
    """text [T, D] @ image [K, D]^T -> [T, K], in fp32 or fp64."""
    if ONEDNN and text.dtype == torch.float32 and text.device.type == "cpu":
        return torch.ops.mkldnn._linear_pointwise(text, image, None, "none", [], "")
    return torch.mm(text, image.t())
