"""What CUDA's distances between rows, and its unfolding of images, hold inside and return.

Paths are those below aten/src/ATen/native of PyTorch 2.13. Shapes: b batches of n and of m rows
with d features.
"""

import math

import torch
from torch import Tensor

from ds_cmli.memory_model.cuda_reductions import staging
from ds_cmli.memory_model.gpus import Limits
from ds_cmli.memory_model.inside import (
    NOTHING,
    Inside,
    Stage,
    accumulate_bytes,
    contiguous_copies,
)

aten = torch.ops.aten
# cuda/Im2Col.cu and Col2Im.cu: their result begins as large as what they are given.
UNFOLDING = {aten.im2col.default, aten.col2im.default}


def _of_pairs(x: Tensor, shape: tuple[int, ...], limits: Limits) -> Stage:
    """The gradient of each pair, and what their sum over the first size of `shape` stores."""
    pairs = torch.empty(shape, dtype=x.dtype, device="meta")
    return (pairs.nbytes, *staging(pairs, [0], accumulate_bytes(x.dtype), limits))


def pdist_backward(args: tuple, limits: Limits) -> Inside:
    """cuda/DistanceKernel.cu (`pdist_backward_kernel_impl`): [n - 1, n, d], which are added up."""
    x = args[1]
    n, d = x.shape
    if n < 2:
        return NOTHING
    return Inside(after=(_of_pairs(x, (n - 1, n, d), limits),))


def cdist_backward(args: tuple, limits: Limits) -> Inside:
    """cuda/DistanceKernel.cu (`cdist_backward_kernel_impl`): [m, b, n, d], which are added up."""
    _, x, y = args[:3]
    batches = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    rows = math.prod(batches), x.shape[-2]
    return Inside(after=(_of_pairs(x, (y.shape[-2], *rows, x.shape[-1]), limits),))


def euclidean(args: tuple, limits: Limits) -> Inside:
    """Distance.cpp (`_euclidean_dist`): the squares of both sides and their norms, which with ones
    extend the rows, so that one product of matrices gives all distances."""
    x, y = args
    item, norms = x.dtype.itemsize, [side.numel() // side.shape[-1] for side in (x, y)]
    (n, m), (of_x, of_y) = [count * item for count in norms], (x.nbytes, y.nbytes)
    left, right = of_x + 2 * n, of_y + 2 * m
    squares = (of_x, n), (n, n, of_y, m), (n, n, m, m, of_x, left), (m, m, left, right)
    both = (left, right)
    return Inside((*squares, both), (both,))


def unfold(args: tuple, limits: Limits) -> Inside:
    """cuda/Im2Col.cu: of images [B, C, H, W]."""
    x, kernel, dilation, padding, stride = args
    shifts = 1
    for size, width, step, border, stay in zip(
        x.shape[-2:], kernel, dilation, padding, stride, strict=True
    ):
        shifts *= (size + 2 * border - step * (width - 1) - 1) // stay + 1
    channels = x.numel() // math.prod(x.shape[-2:])
    return _resized(x, channels * math.prod(kernel) * shifts)


def fold(args: tuple, limits: Limits) -> Inside:
    """cuda/Col2Im.cu: of columns [B, C * kernel, L]."""
    x, size, kernel = args[:3]
    channels = x.numel() // x.shape[-1] // math.prod(kernel)
    return _resized(x, channels * math.prod(size))


def _resized(x: Tensor, numbers: int) -> Inside:
    """A block of the size of `x`, which stays until a larger result has its own."""
    block = (x.nbytes,)
    copies = contiguous_copies(x)
    if numbers > x.numel():
        return Inside((block,), (block + copies,))
    return Inside(after=(copies,))


def unfolding_returned(x: Tensor, out: Tensor) -> Tensor:
    """The result of one of `UNFOLDING`, given what it returns without data: a result that is
    smaller than `x` keeps a block of the size of `x`."""
    if out.numel() >= x.numel():
        return out
    return x.new_empty(x.numel())[: out.numel()].view(out.shape)
