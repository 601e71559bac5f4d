"""Unit vectors, and their gradient."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .sides import upcast


def l2_normalize(x: Tensor) -> Tensor:
    """Scale the rows of x [.., D] to unit length, in fp32 (fp64 for fp64); return x's dtype.

    A row that is shorter than 1e-12 has no direction. It becomes zeros and its gradient is 0,
    whereas `F.normalize` divides its gradient by 1e-12.
    """
    return (upcast(x) / _lengths(x)).to(x.dtype)


def l2_normalize_backward(d_unit: Tensor, x: Tensor) -> Tensor:
    """Overwrite the gradient of the unit rows [.., D] with the gradient of x, and return it."""
    lengths = _lengths(x)
    unit = upcast(x) / lengths
    radial = (unit * d_unit).sum(-1, keepdim=True)
    return d_unit.addcmul_(unit, radial, value=-1).div_(lengths)


def _lengths(x: Tensor) -> Tensor:
    """Return the length of each row [.., 1]; infinity for a row without a direction."""
    return F.threshold(torch.linalg.vector_norm(upcast(x), dim=-1, keepdim=True), 1e-12, math.inf)
