"""The copies of operands that a GPU's matrix products make for cuBLAS.

Source: `prepare_matrix_for_cublas` and `prepare_batch_matrix_for_cublas` of PyTorch's
aten/src/ATen/native/cuda/Blas.cpp.
"""

import torch
from torch import Tensor
from torch._ops import OpOverload

from ds_cmli.allocator.inside import NOTHING, Inside

aten = torch.ops.aten
# The places of the two matrices among the arguments.
MATRICES = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1, aten.baddbmm.default: 1}


def operand_copies(func: OpOverload, args: tuple) -> Inside:
    """The copies of operands that lie neither by rows nor by columns, as expanded gradients do."""
    if func not in MATRICES:
        return NOTHING
    first = MATRICES[func]
    copied = [x for x in args[first : first + 2] if not _as_it_lies(x)]
    return Inside(after=(tuple(x.numel() * x.dtype.itemsize for x in copied),))


def _as_it_lies(x: Tensor) -> bool:
    """Whether cuBLAS takes a matrix [..., rows, columns] as it lies in memory."""
    rows, columns = x.shape[-2:]
    down, along = x.stride()[-2:]
    by_rows = along == 1 and down >= max(1, columns)
    return by_rows or (down == 1 and along >= max(1, rows))
