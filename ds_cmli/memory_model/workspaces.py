"""The memory of CUDA's operators beyond their results: formulas of PyTorch's source, in bytes.

Only operators of training that matter at a step's peak are here. Left out are partial results of
full reductions and the workspaces of cuDNN's convolutions: they are small, or no source gives them.
Paths are below aten/src/ATen/native. "Seen" marks what running PyTorch on tests/null_gpu showed.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.backends import cuda
from torch.utils._pytree import tree_map_only

from ds_cmli.memory_model.caching_allocator import round_up
from ds_cmli.memory_model.gpus import Gpu

aten = torch.ops.aten
FLASH = "flash"
EFFICIENT = "efficient"
MATH = "math"
HALF = (torch.float16, torch.bfloat16)
LITTLE_SHARED = ((8, 6), (8, 9), (12, 0))  # compute capabilities with less shared memory
# The sizes of the blocks that an operator holds at one moment, in the order of their allocation.
# Blocks of equal size in two stages that follow each other stay allocated.
Stage = tuple[int, ...]


class Inside(NamedTuple):
    """The stages of an operator's own blocks before and after its results are allocated; all have
    been freed when it returns."""

    before: tuple[Stage, ...] = ()
    after: tuple[Stage, ...] = ()


def returned(func: OpOverload, args: tuple, out: Any) -> Any:
    """Return what an operator returns on CUDA, given what it returns without data.

    Layer norm's statistics of 16-bit inputs are in fp32 there (cuda/layer_norm_kernel.cu), the two
    numbers of efficient attention on the host, and cuDNN's convolutions channels last where an
    operand is so.
    """
    if func in (aten.convolution.default, aten.convolution_backward.default):
        _, x, weight, *_ = (None, *args) if func is aten.convolution.default else args
        if _suggested(x, weight) is torch.channels_last and weight.shape[1] > 1:
            return tree_map_only(Tensor, _channels_last, out)
    if func is aten.native_layer_norm.default:
        normalised, mean, inverse_deviation = out
        return normalised, mean.float(), inverse_deviation.float()
    if func is aten._scaled_dot_product_efficient_attention.default:
        attended, lse, *numbers = out
        return attended, lse, *(torch.empty_like(number, device="cpu") for number in numbers)
    return out


def _channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x


def _copies(*tensors: Tensor, layout=torch.contiguous_format) -> Stage:
    """Return what `x.contiguous(memory_format=layout)` of each tensor allocates."""
    return tuple(x.nbytes for x in tensors if not x.is_contiguous(memory_format=layout))


def _suggested(*tensors: Tensor) -> torch.memory_format:
    """Return channels last if a tensor is so, and else contiguous."""
    last = torch.channels_last
    strided = [x for x in tensors if x.dim() == 4 and not x.is_contiguous()]
    is_last = any(x.is_contiguous(memory_format=last) for x in strided)
    return last if is_last else torch.contiguous_format


def _convolution_backward(gpu: Gpu, grad: Tensor, x: Tensor, weight: Tensor, *_: object) -> Inside:
    """cudnn/ConvShared.cpp: operands become contiguous alike, and channels last if one is so."""
    if weight.shape[1] == 1:  # PyTorch's own kernel convolves, which copies nothing
        return Inside()
    layout = _suggested(x, weight)
    kept = _copies(grad, layout=layout)  # while the other gradients are computed
    return Inside((kept + _copies(x, weight, layout=layout), kept), (kept,))


def _softmax(gpu: Gpu, x: Tensor, *_: object) -> Inside:
    """cuda/SoftMax.cu (`host_softmax`)."""
    return Inside(after=(_copies(x),))


def _softmax_backward(gpu: Gpu, grad: Tensor, out: Tensor, *_: object) -> Inside:
    """cuda/SoftMax.cu (`softmax_backward_cuda_out`): gradient and output are multiplied first."""
    return Inside(after=((grad.nbytes, *_copies(out)),))


# --- sums over rows


def _partial_sums(rows: int, columns: int, gpu: Gpu) -> Stage:
    """Return the buffers of blocks of threads that add up the rows of the same columns.

    cuda/Reduce.cuh (`setReduceConfig`): a block has 32 threads for 4 columns each, by 4, of which
    each adds up 16 to 256 values; then the semaphores.
    """
    grid = math.ceil(columns / 128)
    blocks = gpu.multiprocessors * gpu.max_threads // 128
    if columns < 128 or rows <= 1020 or grid > blocks:
        return ()
    parts = max(min(math.ceil(blocks / grid), math.ceil(rows / 64)), math.ceil(rows / 1024))
    return (512 * columns * parts, 4 * grid) if parts > 1 else ()


def _sum(gpu: Gpu, x: Tensor, dims: list[int] | None, *_: object) -> Inside:
    """The gradient of a bias: the first dimensions of a tensor are added up."""
    reduced = sorted(dim % x.dim() for dim in dims or ()) if x.dim() else []
    if not reduced or reduced != list(range(len(reduced))) or not x.is_contiguous():
        return Inside()
    rows = math.prod(x.shape[: len(reduced)])
    return Inside(after=(_partial_sums(rows, x.numel() // max(rows, 1), gpu),))


def _layer_norm_backward(gpu: Gpu, grad: Tensor, x: Tensor, shape: list[int], *_: object) -> Inside:
    """cuda/layer_norm_kernel.cu (`LaunchGammaBetaBackwardCUDAKernel`): of many short rows, the
    gradients of weight and bias are first summed over 32 rows each, and then by `sum`."""
    copies = _copies(x, grad)
    width = math.prod(shape)
    rows = x.numel() // width
    if rows <= 1 << 16 or width // 32 >= gpu.multiprocessors // 2:
        return Inside((_copies(x),), (copies,))
    blocks = min((1 << 15) // math.ceil(width / 32), math.ceil(rows / 32))
    partial = (*copies, *2 * (blocks * width * grad.dtype.itemsize,))
    summed = (*partial, width * grad.dtype.itemsize, *_partial_sums(blocks, width, gpu))
    return Inside((_copies(x),), (summed, partial, summed))


# --- embeddings

INDEX = 8  # bytes of an int64
SCAN = 1279  # bytes of cub's prefix sums of up to 20,000 numbers


def _sorted_pairs(n: int, largest: int, gpu: Gpu) -> Stage:
    """Return what cub's radix sort of `n` int64 keys up to `largest` stores, with int64 values.

    cub/device/dispatch/dispatch_radix_sort.cuh (`InvokeOnesweep`): 256 counts for each 8 bits of
    the keys, a table that blocks read from each other, and both arrays once more where there is
    more than one pass. How many keys a block sorts was seen.
    """
    if n <= 2048:
        return (1,)
    passes = math.ceil(max(1, largest.bit_length()) / 8)
    tile = 3840 if gpu.capability < (9, 0) else 4608
    arrays = 2 * math.ceil(n * INDEX / 256) * 256 if passes > 1 else 0
    return (arrays + passes * 256 * INDEX + math.ceil(n / tile) * 1024 + 256 + 255,)


def _embedding_backward(gpu: Gpu, grad: Tensor, indices: Tensor, rows: int, *_: object) -> Inside:
    """cuda/Embedding.cu, EmbeddingBackwardKernel.cu: more than 3,072 indices are sorted; gradients
    of equal indices are added up ten at a time, in fp32, and then by index. Of a small table whose
    rows are frequent, the sums of ten are added to the table at once, for 16 bits in one of fp32;
    which tables these are was seen."""
    n = indices.numel()
    width = grad.shape[-1]
    copies = _copies(indices, grad)
    if n <= 3072:
        return Inside((copies,))
    segments = min(n, rows)  # of equal indices
    parts = n // 10 + segments  # of at most ten equal indices
    index_array = n * INDEX
    segment_array = segments * INDEX
    part_array = parts * INDEX
    # 1. The indices and their positions are sorted.
    sorted_indices = (*copies, index_array, index_array)
    sorting = (*sorted_indices, index_array, *_sorted_pairs(n, rows, gpu))
    # 2. The segments are counted, and then their parts.
    segments_counted = (*sorted_indices, index_array, INDEX)
    counting_segments = (*segments_counted, index_array, SCAN)
    counting_parts = (*segments_counted, segment_array, segment_array, SCAN)
    # 3. The parts are summed.
    sums: Stage = (parts * width * 4,)
    table_is_small = segments * math.ceil(width / 1024) < 4 * gpu.multiprocessors
    if table_is_small and parts >= 4 * segments:
        sums = (part_array, rows * width * 4) if grad.dtype.itemsize < 4 else (part_array,)
    summing = (*segments_counted, segment_array, segment_array, INDEX, part_array, *sums)
    return Inside((sorting, sorted_indices), (counting_segments, counting_parts, summing))


# --- attention


def attention(
    query: Tensor,  # [B, H, S, D]
    key: Tensor,  # [B, H, T, D]
    value: Tensor,  # [B, H, T, E]
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    grouped: bool,  # `enable_gqa`, by which heads of the query share one of key and value
    gpu: Gpu,
) -> str:
    """Return the kernel that CUDA takes, of those that are on: transformers/cuda/sdp_utils.cpp
    (`select_sdp_backend`). Where cuDNN's comes first, it keeps what flash attention keeps."""
    inputs = query, key, value
    widths = {x.shape[-1] for x in inputs}
    dtypes = {x.dtype for x in inputs}
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    heads = query.shape[-3:-2]
    fits_fused = all(x.dim() == 4 and x.stride(-1) == 1 and x.numel() for x in inputs)
    fits_fused &= len(dtypes) == len({x.shape[0] for x in inputs}) == 1
    same_heads = fits_fused and len({x.shape[1] for x in inputs}) == 1
    can_group = grouped and key.shape[-3:-2] == value.shape[-3:-2]
    shared_heads = same_heads or (fits_fused and can_group and not heads[0] % key.shape[1])
    ampere = gpu.capability >= (8, 0)
    half = query.dtype in HALF
    width = query.shape[-1]

    width_fits = len(widths) == 1 and width <= 256
    if trained and gpu.capability in LITTLE_SHARED:
        width_fits &= width <= 192 or (width > 224 and not dropout)
    causal_is_square = not causal or query.shape[-2] == key.shape[-2]
    flash_fits = shared_heads and ampere and half and mask is None and width_fits
    if cuda.flash_sdp_enabled() and flash_fits and causal_is_square:
        return FLASH
    multiple = 1  # of elements, at which rows begin
    if half:
        multiple = 8
    elif ampere:
        multiple = 4
    is_aligned = not any(size % multiple for size in widths) and key.shape[-1] == width
    is_aligned &= not ampere or not any(x.storage_offset() % multiple for x in inputs)
    supported_types = (torch.float32, *HALF) if ampere else (torch.float32, torch.float16)
    mask_is_dense = mask is None or mask.stride(-1) == 1
    efficient_fits = same_heads and query.dtype in supported_types and is_aligned and mask_is_dense
    if cuda.mem_efficient_sdp_enabled() and efficient_fits:
        return EFFICIENT
    return MATH


def _head_copies(*gradients: Tensor) -> Stage:
    """Return the copies of [B, H, S, D] tensors whose [B, S, H, D] is not contiguous."""
    return _copies(*(x.transpose(1, 2) for x in gradients))


def _flash_backward(
    gpu: Gpu, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, *_: object
) -> Inside:
    """transformers/cuda/flash_attn/flash_api.cpp (`mha_bwd`): the row sums of the gradient times
    the output, and the query's gradient in fp32, rounded up to tiles of 128 rows and of 32
    features, or of 64 above 128; if deterministic, one such gradient for each block that works on a
    head. Where heads share keys and values, each has gradients of its own, which are summed."""
    batch, heads, rows, width = query.shape
    sums = batch * heads * round_up(rows, 128) * 4
    deterministic = torch.are_deterministic_algorithms_enabled()
    splits = math.ceil(gpu.multiprocessors / (batch * heads)) if deterministic else 1
    copies = _head_copies(grad, out)
    shared_gradients: Stage = ()
    if key.shape[1] != heads:
        shared_gradients = 2 * (batch * heads * key.shape[2] * width * key.dtype.itemsize,)
    query_gradient = splits * sums * round_up(width, 32 if width <= 128 else 64)
    return Inside((copies,), ((*copies, sums, query_gradient, *shared_gradients),))


def _efficient_backward(
    gpu: Gpu,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,  # bias, out, lse, seed, offset, dropout and more
) -> Inside:
    """transformers/cuda/attention_backward.cu and mem_eff_attention/kernel_backward.h: the row sums
    of the gradient times the output, which fp32 computes by PyTorch's own operators, and partial
    gradients in fp32: of the queries always, of keys and values where they do not fit into
    registers. The kernel is the first that fits (kernels/cutlassB.h), which was seen."""
    _, _, _, _, _, dropout, *_ = args
    batch, heads, rows, width = query.shape
    keys = key.shape[2]
    value_width = value.shape[-1]
    half = query.dtype in HALF
    total_heads = batch * heads
    widest = max(width, value_width)
    large = gpu.shared_bytes > 100 * 1024
    ampere = gpu.capability >= (8, 0)
    query_block = 64
    key_block = 64
    max_kept = 64  # features whose gradients stay in registers
    if widest > 64 and half:
        narrow = gpu.capability in ((8, 6), (8, 9)) and widest <= 96 and not dropout
        if narrow or widest > 128 or not ampere:
            query_block = max_kept = 128
        elif large:
            query_block = key_block = max_kept = 128
    elif widest > 64 and large and ampere:
        query_block = 128
    staged = half and widest > max_kept
    splits = math.ceil(keys / key_block)
    deterministic = torch.are_deterministic_algorithms_enabled()
    if deterministic or (total_heads >= 256 and keys <= 2 * key_block):
        splits = 1
    if staged:
        splits = max(1, min(splits, 200 // total_heads))
    tiles = math.ceil(rows / query_block) * math.ceil(width / key_block)
    elements = tiles * (4 + query_block * key_block)  # a lock and a counter, padded, each
    if staged:
        widths = round_up(width, query_block) + round_up(value_width, query_block)
        elements += splits * key_block * widths
    sums = total_heads * rows * 4
    workspace = total_heads * round_up(elements, 4) * 4
    copies = _head_copies(grad)
    held = (*copies, sums, workspace)
    return Inside((copies,), (held,) if half else ((*copies, grad.numel() * 4, sums, sums), held))


# Each function takes the GPU and the operator's positional arguments.
OPERATORS: dict[OpOverload, Callable[..., Inside]] = {
    aten.sum.dim_IntList: _sum,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten._softmax.default: _softmax,
    aten._log_softmax.default: _softmax,
    aten._softmax_backward_data.default: _softmax_backward,
    aten.convolution_backward.default: _convolution_backward,
    aten.embedding_dense_backward.default: _embedding_backward,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
}

# --- cuBLAS

PRODUCT_NAMES = "mm bmm addmm baddbmm mv addmv dot vdot"
PRODUCTS = {getattr(aten, name).default for name in PRODUCT_NAMES.split()}
PRODUCTS |= {aten.mm.out, aten.bmm.out, aten.addmm.out, aten.addmm_.default}
LT_WORKSPACE = 1 << 20  # bytes, of cublasLt, which multiplies where there is a bias
KEEPS_WORKSPACES = torch.__version__ < "2.15"  # compared as versions
