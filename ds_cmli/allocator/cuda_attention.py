"""Which kernel CUDA's attention takes, and what its backward holds inside.

cuDNN's attention is left out: this project switches it off (`common/hardware.py`).
"""

import math

import torch
from torch import Tensor

from ds_cmli.allocator.gpus import Limits
from ds_cmli.allocator.inside import HALF, Inside, Stage, ceil_to, contiguous_copies

FLASH, EFFICIENT, MATH = "flash", "efficient", "math"


def chosen(query: Tensor, masked: bool, limits: Limits) -> str:
    """The kernel that `F.scaled_dot_product_attention` takes, without cuDNN's.

    Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (`select_sdp_backend`): flash
    attention needs sm_80, 16 bits, at most 256 features and no mask; the memory-efficient kernel
    has bfloat16 from sm_80 on.

    Args:
        query: [B, H, S, D], or with another number of dimensions, which only the math kernel takes.
    """
    ampere = limits.capability >= (8, 0)
    if ampere and query.dtype in HALF and not masked and query.shape[-1] <= 256:
        return FLASH
    if query.dtype == torch.float64 or query.dim() != 4:
        return MATH
    if query.dtype == torch.bfloat16 and not ampere:
        return MATH
    return EFFICIENT


def _copies(*gradients: Tensor) -> Stage:
    """Copies of [B, H, S, D] tensors whose [B, S, H, D] is not contiguous."""
    return contiguous_copies(*(x.transpose(1, 2) for x in gradients))


def flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, out: Tensor, limits: Limits, deterministic: bool
) -> Inside:
    """Source: transformers/cuda/flash_attn/flash_api.cpp (`mha_bwd`): the row sums of the gradient
    times the output, and the query's gradient in fp32, rounded up to tiles of 128 rows and of 32
    features, or of 64 above 128; if deterministic, one such gradient for each block that works on a
    head. Where heads share keys and values, each has gradients of its own, which are summed."""
    batch, heads, rows, width = query.shape
    rounded = ceil_to(width, 32 if width <= 128 else 64)
    sums = batch * heads * ceil_to(rows, 128) * 4
    splits = math.ceil(limits.multiprocessors / (batch * heads)) if deterministic else 1
    copies = _copies(grad, out)
    of_heads: Stage = ()
    if key.shape[1] != heads:
        of_heads = (batch * heads * key.shape[2] * width * key.dtype.itemsize,) * 2
    return Inside((copies,), ((*copies, sums, splits * sums * rounded, *of_heads),))


class _Kernel:
    """The memory-efficient backward kernel that is the first to fit.

    Source: mem_eff_attention/kernels/cutlassB.h (`dispatch_cutlassB`): the order of the kernels,
    and kernel_backward.h: whether a block keeps the gradients of keys and values in registers.
    Which ones fit into the shared memory of a block was seen on the null GPU: all but those of 128
    x 128, and of 128 x 64 in fp32, fit into 64 KB.
    """

    def __init__(self, width: int, half: bool, limits: Limits):
        large = limits.shared > 100 * 1024
        self.queries = self.keys = 64
        kept = 64  # the most features whose gradients stay in registers
        if width > 64 and half:
            narrow = limits.capability in ((8, 6), (8, 9)) and width <= 96
            if narrow or width > 128 or limits.capability < (8, 0):
                self.queries = kept = 128
            elif large:
                self.queries = self.keys = kept = 128
        elif width > 64 and large and limits.capability >= (8, 0):
            self.queries = 128
        self.staged = half and width > kept


def efficient_backward(
    grad: Tensor, query: Tensor, key: Tensor, limits: Limits, deterministic: bool
) -> Inside:
    """Source: transformers/cuda/attention_backward.cu (`_efficient_attention_backward`) and
    mem_eff_attention/kernel_backward.h (`workspace_size`): the row sums of the gradient times the
    output, which fp32 computes by PyTorch's own operators, and partial gradients in fp32: of the
    queries always, of keys and values where they do not fit into registers."""
    batch, heads, rows, width = query.shape
    keys, together = key.shape[2], batch * heads
    half = query.dtype in HALF
    kernel = _Kernel(width, half, limits)
    splits = math.ceil(keys / kernel.keys)
    if together >= 256 and keys <= 2 * kernel.keys:
        splits = 1
    if kernel.staged:
        splits = max(1, min(splits, 200 // together))
    if deterministic:
        splits = 1
    tiles = math.ceil(rows / kernel.queries) * math.ceil(width / kernel.keys)
    elements = tiles * (4 + kernel.queries * kernel.keys)  # a lock and a counter, padded, each
    if kernel.staged:
        elements += 2 * splits * kernel.keys * ceil_to(width, kernel.queries)
    sums, workspace = together * rows * 4, together * ceil_to(elements, 4) * 4
    copies = _copies(grad)
    held = (*copies, sums, workspace)
    if half:
        return Inside((copies,), (held,))
    product = query.numel() * 4
    return Inside((copies,), ((*copies, product, sums, sums), held))
