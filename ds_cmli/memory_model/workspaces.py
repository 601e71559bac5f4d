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
SMALL_SHARED_MEMORY = ((8, 6), (8, 9), (12, 0))  # compute capabilities
# The sizes of the blocks that an operator holds at one moment, in the order of their allocation.
# Blocks of equal size in two stages that follow each other stay allocated.
Stage = tuple[int, ...]


class Scratch(NamedTuple):
    """An operator's blocks besides its results, all freed when the operator returns."""

    before: tuple[Stage, ...] = ()  # the stages before the results are allocated
    after: tuple[Stage, ...] = ()  # the stages after that


def cuda_result(func: OpOverload, args: tuple, out: Any) -> Any:
    """Change `out`, an operator's result without data, to the result that CUDA returns.

    On CUDA layer norm returns the statistics of 16-bit inputs in fp32 (cuda/layer_norm_kernel.cu),
    efficient attention returns its two random numbers on the host, and cuDNN's convolutions return
    channels last if an operand has that layout.
    """
    if func in (aten.convolution.default, aten.convolution_backward.default):
        operands = args if func is aten.convolution.default else args[1:]  # without the gradient
        x, weight, *_ = operands
        if _suggested_layout(x, weight) is torch.channels_last and weight.shape[1] > 1:
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


def _suggested_layout(*tensors: Tensor) -> torch.memory_format:
    """Return channels last if a tensor has that layout alone, otherwise contiguous."""
    last = torch.channels_last
    strided = [x for x in tensors if x.dim() == 4 and not x.is_contiguous()]
    is_last = any(x.is_contiguous(memory_format=last) for x in strided)
    return last if is_last else torch.contiguous_format


def _convolution_backward(gpu: Gpu, grad: Tensor, x: Tensor, weight: Tensor, *_: object) -> Scratch:
    """cudnn/ConvShared.cpp: operands are copied to one layout, channels last if one has it."""
    if weight.shape[1] == 1:  # PyTorch's own kernel convolves, which copies nothing
        return Scratch()
    layout = _suggested_layout(x, weight)
    grad_copy = _copies(grad, layout=layout)  # stays while the other gradients are computed
    return Scratch((grad_copy + _copies(x, weight, layout=layout), grad_copy), (grad_copy,))


def _softmax(gpu: Gpu, x: Tensor, *_: object) -> Scratch:
    """cuda/SoftMax.cu (`host_softmax`)."""
    return Scratch(after=(_copies(x),))


def _softmax_backward(gpu: Gpu, grad: Tensor, out: Tensor, *_: object) -> Scratch:
    """cuda/SoftMax.cu (`softmax_backward_cuda_out`): gradient and output are multiplied first."""
    return Scratch(after=((grad.nbytes, *_copies(out)),))


# --- sums over rows


def _partial_sums(rows: int, columns: int, gpu: Gpu) -> Stage:
    """Return the buffers of blocks of threads that add up the rows of the same columns.

    cuda/Reduce.cuh (`setReduceConfig`): a block has 4 rows of 32 threads. A row of threads covers
    128 columns, and each thread adds up 16 to 256 values of 4 columns. The second buffer holds the
    semaphores.
    """
    grid = math.ceil(columns / 128)
    max_blocks = gpu.multiprocessors * gpu.max_threads // 128  # that run at a time
    if columns < 128 or math.ceil(rows / 4) < 256 or grid > max_blocks:
        return ()
    parts = max(min(math.ceil(max_blocks / grid), math.ceil(rows / 64)), math.ceil(rows / 1024))
    return (512 * columns * parts, 4 * grid) if parts > 1 else ()


def _sum(gpu: Gpu, x: Tensor, dims: list[int] | None, *_: object) -> Scratch:
    """Return the buffers of a sum over the first dimensions, such as a bias's gradient."""
    reduced = sorted(dim % x.dim() for dim in dims or ()) if x.dim() else []
    if not reduced or reduced != list(range(len(reduced))) or not x.is_contiguous():
        return Scratch()
    rows = math.prod(x.shape[: len(reduced)])
    return Scratch(after=(_partial_sums(rows, x.numel() // max(rows, 1), gpu),))


def _layer_norm_backward(
    gpu: Gpu, grad: Tensor, x: Tensor, shape: list[int], *_: object
) -> Scratch:
    """cuda/layer_norm_kernel.cu (`LaunchGammaBetaBackwardCUDAKernel`): with many short rows, the
    gradients of weight and bias are summed over 32 rows each, and `sum` adds up these sums."""
    copies = _copies(x, grad)
    width = math.prod(shape)
    rows = x.numel() // width
    if rows <= 1 << 16 or width // 32 >= gpu.multiprocessors // 2:
        return Scratch((_copies(x),), (copies,))
    blocks = min((1 << 15) // math.ceil(width / 32), math.ceil(rows / 32))
    with_partials = (*copies, *2 * (blocks * width * grad.dtype.itemsize,))
    summing = (*with_partials, width * grad.dtype.itemsize, *_partial_sums(blocks, width, gpu))
    return Scratch((_copies(x),), (summing, with_partials, summing))


# --- embeddings

INDEX_BYTES = 8  # bytes of an int64
SCAN = 1279  # bytes of cub's prefix sums of up to 20,000 numbers


def _sorted_pairs(n: int, max_key: int, gpu: Gpu) -> Stage:
    """Return what cub's radix sort of `n` int64 keys up to `max_key` stores, with int64 values.

    cub/device/dispatch/dispatch_radix_sort.cuh (`InvokeOnesweep`): 256 counts for each 8 bits of
    the keys, a table that blocks read from each other, and both arrays once more if there is more
    than one pass. How many keys a block sorts was seen.
    """
    if n <= 2048:
        return (1,)
    passes = math.ceil(max(1, max_key.bit_length()) / 8)
    keys_per_block = 3840 if gpu.capability < (9, 0) else 4608
    arrays = 2 * math.ceil(n * INDEX_BYTES / 256) * 256 if passes > 1 else 0
    return (arrays + passes * 256 * INDEX_BYTES + math.ceil(n / keys_per_block) * 1024 + 256 + 255,)


def _embedding_backward(gpu: Gpu, grad: Tensor, indices: Tensor, rows: int, *_: object) -> Scratch:
    """cuda/Embedding.cu, EmbeddingBackwardKernel.cu: more than 3,072 indices are sorted.

    The gradients of equal indices are added up ten at a time, in fp32. Then these sums are added up
    by index, or, if the table is small and its rows are frequent, added to the table at once; for
    16-bit gradients that is a table in fp32. Which tables are small was seen.
    """
    n = indices.numel()
    width = grad.shape[-1]
    copies = _copies(indices, grad)
    if n <= 3072:
        return Scratch((copies,))
    segments = min(n, rows)  # of equal indices
    parts = n // 10 + segments  # of at most ten equal indices
    index_array = n * INDEX_BYTES
    segment_array = segments * INDEX_BYTES
    part_array = parts * INDEX_BYTES
    # 1. The indices and their positions are sorted.
    sorted_indices = (*copies, index_array, index_array)
    sorting = (*sorted_indices, index_array, *_sorted_pairs(n, rows, gpu))
    # 2. The segments are counted, and then their parts.
    segments_counted = (*sorted_indices, index_array, INDEX_BYTES)
    counting_segments = (*segments_counted, index_array, SCAN)
    counting_parts = (*segments_counted, segment_array, segment_array, SCAN)
    # 3. The parts are summed.
    sums: Stage = (parts * width * 4,)
    table_is_small = segments * math.ceil(width / 1024) < 4 * gpu.multiprocessors
    if table_is_small and parts >= 4 * segments:
        sums = (part_array, rows * width * 4) if grad.dtype.itemsize < 4 else (part_array,)
    summing = (*segments_counted, segment_array, segment_array, INDEX_BYTES, part_array, *sums)
    return Scratch((sorting, sorted_indices), (counting_segments, counting_parts, summing))


# --- attention


def attention_kernel(
    query: Tensor,  # [B, H, S, D]
    key: Tensor,  # [B, H, T, D]
    value: Tensor,  # [B, H, T, E]
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    grouped: bool,  # `enable_gqa`, by which heads of the query share one of key and value
    gpu: Gpu,
) -> str:
    """Choose among the enabled kernels as transformers/cuda/sdp_utils.cpp (`select_sdp_backend`).

    FLASH stands for cuDNN's kernel too, which keeps the same tensors for backward.
    """
    inputs = query, key, value
    widths = {x.shape[-1] for x in inputs}
    dtypes = {x.dtype for x in inputs}
    needs_backward = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
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
    if needs_backward and gpu.capability in SMALL_SHARED_MEMORY:
        width_fits &= width <= 192 or (width > 224 and not dropout)
    causal_is_square = not causal or query.shape[-2] == key.shape[-2]
    flash_fits = shared_heads and ampere and half and mask is None and width_fits
    if cuda.flash_sdp_enabled() and flash_fits and causal_is_square:
        return FLASH
    alignment = 1  # elements; each row begins at a multiple of it
    if half:
        alignment = 8
    elif ampere:
        alignment = 4
    is_aligned = not any(size % alignment for size in widths) and key.shape[-1] == width
    is_aligned &= not ampere or not any(x.storage_offset() % alignment for x in inputs)
    supported_types = (torch.float32, *HALF) if ampere else (torch.float32, torch.float16)
    mask_is_dense = mask is None or mask.stride(-1) == 1
    efficient_fits = same_heads and query.dtype in supported_types and is_aligned and mask_is_dense
    if cuda.mem_efficient_sdp_enabled() and efficient_fits:
        return EFFICIENT
    return MATH


def _head_copies(*gradients: Tensor) -> Stage:
    """Return the copies that make [B, H, S, D] tensors contiguous as [B, S, H, D]."""
    return _copies(*(x.transpose(1, 2) for x in gradients))


def _flash_backward(
    gpu: Gpu, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, *_: object
) -> Scratch:
    """transformers/cuda/flash_attn/flash_api.cpp (`mha_bwd`): the row sums of the gradient times
    the output, and the query's gradient in fp32.

    Rows are rounded up to multiples of 128, features to multiples of 32, or of 64 above 128. If
    deterministic, each block that works on a head has a query gradient of its own. If heads share
    keys and values, each head first has their gradients of its own, which are then summed.
    """
    batch, heads, rows, width = query.shape
    sums = batch * heads * round_up(rows, 128) * 4  # fp32, one number a row
    deterministic = torch.are_deterministic_algorithms_enabled()
    splits = math.ceil(gpu.multiprocessors / (batch * heads)) if deterministic else 1
    copies = _head_copies(grad, out)
    shared_gradients: Stage = ()
    if key.shape[1] != heads:
        shared_gradients = 2 * (batch * heads * key.shape[2] * width * key.dtype.itemsize,)
    query_gradient = splits * sums * round_up(width, 32 if width <= 128 else 64)
    return Scratch((copies,), ((*copies, sums, query_gradient, *shared_gradients),))


def _efficient_blocks(gpu: Gpu, widest: int, half: bool, dropout: float) -> tuple[int, int, int]:
    """Return the rows of a block of queries and of keys, and the maximum number of features whose
    gradients stay in registers, of the first kernel of kernels/cutlassB.h that fits (seen)."""
    large = gpu.shared_bytes > 100 * 1024
    ampere = gpu.capability >= (8, 0)
    if widest <= 64:
        return 64, 64, 64
    if not half:
        return (128, 64, 64) if large and ampere else (64, 64, 64)
    is_narrow = gpu.capability in ((8, 6), (8, 9)) and widest <= 96 and not dropout
    if is_narrow or widest > 128 or not ampere:
        return 128, 64, 128
    return (128, 128, 128) if large else (64, 64, 64)


def _efficient_backward(
    gpu: Gpu,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
) -> Scratch:
    """transformers/cuda/attention_backward.cu and mem_eff_attention/kernel_backward.h: the row sums
    of the gradient times the output, and partial gradients in fp32.

    In fp32 PyTorch's own operators compute the row sums, with temporary tensors. The queries always
    have partial gradients; keys and values have them if they do not fit into registers.
    """
    _bias, _out, _lse, _seed, _offset, dropout, *_ = args
    batch, heads, rows, width = query.shape
    keys = key.shape[2]
    value_width = value.shape[-1]
    half = query.dtype in HALF
    total_heads = batch * heads
    widest = max(width, value_width)
    query_block, key_block, max_in_registers = _efficient_blocks(gpu, widest, half, dropout)
    stores_key_partials = half and widest > max_in_registers  # and those of values
    splits = math.ceil(keys / key_block)
    deterministic = torch.are_deterministic_algorithms_enabled()
    if deterministic or (total_heads >= 256 and keys <= 2 * key_block):
        splits = 1
    if stores_key_partials:
        splits = max(1, min(splits, 200 // total_heads))
    tiles = math.ceil(rows / query_block) * math.ceil(width / key_block)
    elements = tiles * (4 + query_block * key_block)  # 4: a tile's lock and counter, padded
    if stores_key_partials:
        widths = round_up(width, query_block) + round_up(value_width, query_block)
        elements += splits * key_block * widths
    sums = total_heads * rows * 4
    workspace = total_heads * round_up(elements, 4) * 4
    copies = _head_copies(grad)
    in_kernel = (*copies, sums, workspace)
    if half:
        return Scratch((copies,), (in_kernel,))
    computing_sums = (*copies, grad.numel() * 4, sums, sums)
    return Scratch((copies,), (computing_sums, in_kernel))


# Each function takes the GPU and the operator's positional arguments.
FORMULAS: dict[OpOverload, Callable[..., Scratch]] = {
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
LT_WORKSPACE = 1 << 20  # bytes for cublasLt, which computes the products with a bias
KEEPS_WORKSPACES = torch.__version__ < "2.15"  # TorchVersion compares versions, not texts
