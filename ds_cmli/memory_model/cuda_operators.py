"""What CUDA's operators hold inside, beyond what they return, by formulas of PyTorch's source.

Left out, as it is less than 10 KB a call or as no source tells it: the temporaries of scans, of
`nonzero` and of batch normalisation, and the workspaces of cuDNN's convolutions. Paths are those
below aten/src/ATen/native of PyTorch 2.13.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_map_only

from ds_cmli.memory_model import cuda_attention, cuda_distances, cuda_layouts, cuda_reductions
from ds_cmli.memory_model.cuda_layouts import MATRICES, TRANSFERS, suggested
from ds_cmli.memory_model.cuda_reductions import cast, reduced_dimensions, staging
from ds_cmli.memory_model.gpus import Limits
from ds_cmli.memory_model.inside import (
    NOTHING,
    Inside,
    Stage,
    accumulate_bytes,
    ceil_to,
    contiguous_copies,
)

aten = torch.ops.aten
Keywords = Mapping[str, object]
SCAN = 1279  # bytes of cub's prefix sums of up to 20,000 numbers
INDEX = 8  # bytes of an int64
# Operators whose results CUDA allocates from the last to the first.
LAST_FIRST = {aten.native_dropout.default}


def inside(
    func: OpOverload, args: tuple, kwargs: Keywords | None, limits: Limits, deterministic: bool
) -> Inside:
    """The blocks that an ATen operator holds inside on a GPU of these limits.

    Args:
        args, kwargs: real or fake tensors: only their sizes, strides and dtypes matter.
        deterministic: whether PyTorch uses deterministic algorithms only.
    """
    if func in REDUCTIONS:
        return _reduction(func, args, kwargs or {}, limits)
    if func is aten._scaled_dot_product_flash_attention_backward.default:
        grad, query, key, _, out = args[:5]
        return cuda_attention.flash_backward(grad, query, key, out, limits, deterministic)
    if func is aten._scaled_dot_product_efficient_attention_backward.default:
        return cuda_attention.efficient_backward(args, limits, deterministic)
    if func in MATRICES:
        return cuda_layouts.operand_copies(func, args)
    if func in TRANSFERS:
        return cuda_layouts.transfer_copies(func, args, dict(kwargs or {}))
    if func in OTHERS:
        return OTHERS[func](args, limits)
    return NOTHING


def _partial_bytes(func: OpOverload, x: Tensor) -> int:
    """Bytes of one partial result: aten/src/ATen/native/cuda/Reduce*Kernel.cu, the type of what
    each kernel's `combine` takes."""
    if func in EXTREMES:
        return x.dtype.itemsize
    if func in TRUTHS:
        return 1
    if func in WITH_PLACES:
        return 16  # a value and an int64, aligned
    if func in MOMENTS:
        return 32 if x.dtype == torch.float64 else 16  # `WelfordData`
    return accumulate_bytes(x.dtype)


def _reduction(func: OpOverload, args: tuple, kwargs: Keywords, limits: Limits) -> Inside:
    x, place = args[0], REDUCTIONS[func]
    dims: Any = None  # of a reduction of all, and where an operator is given none
    if func not in WHOLE and len(args) > place:
        dims = args[place]
    elif func not in WHOLE:
        dims = kwargs.get("dim")
    copy: Stage = ()
    if func in SUMS:
        dtype = kwargs.get("dtype")
        if not isinstance(dtype, torch.dtype):
            dtype = x.dtype if x.dtype.is_floating_point else torch.int64
        copy = cast(x, dtype)
        if copy:
            x = torch.empty_like(x, dtype=dtype, device="meta")
    unroll = 2 if func in MOMENTS else 4
    partial = staging(x, reduced_dimensions(x, dims), _partial_bytes(func, x), limits, unroll)
    return Inside(after=((*copy, *partial),))


def _logsumexp(args: tuple, limits: Limits) -> Inside:
    """ReduceOps.cpp (`logsumexp_out_impl`): the maxima, whether they are infinite, and the
    exponentials that are summed."""
    x, dims = args[:2]
    reduced = reduced_dimensions(x, dims)
    maxima = x.numel() // math.prod(x.shape[dim] for dim in reduced) * x.dtype.itemsize
    of_maxima = staging(x, reduced, x.dtype.itemsize, limits)
    of_sums = staging(x, reduced, accumulate_bytes(x.dtype), limits)
    held = maxima, x.nbytes  # the latter for the exponentials
    before = ((maxima, *of_maxima), (maxima, maxima, maxima // x.dtype.itemsize), held)
    return Inside(before, ((*held, *of_sums),))


def _is_infinite(args: tuple, limits: Limits) -> Inside:
    """UnaryOps.cpp (`isinf`): the absolute values."""
    return Inside(((args[0].nbytes,),))


def _layer_norm_backward(args: tuple, limits: Limits) -> Inside:
    """cuda/layer_norm_kernel.cu (`LaunchGammaBetaBackwardCUDAKernel`): of many short rows, the
    gradients of weight and bias are first summed over 32 rows each, and then by `sum`."""
    grad, x, shape = args[:3]
    copied = cuda_layouts.layer_norm_backward(args, limits)
    width = math.prod(shape)
    rows = x.numel() // width
    if rows <= 1 << 16 or width // 32 >= limits.multiprocessors // 2:
        return copied
    blocks = min((1 << 15) // math.ceil(width / 32), math.ceil(rows / 32))
    sums = torch.empty((blocks, width), dtype=grad.dtype, device="meta")
    both, row = (*copied.after[0], sums.nbytes, sums.nbytes), width * grad.dtype.itemsize
    summed = (*both, row, *staging(sums, [0], 4, limits))
    return Inside(copied.before, (summed, both, summed))


def _sorted_pairs(n: int, largest: int, limits: Limits) -> Stage:
    """What cub's radix sort of `n` int64 keys up to `largest` stores, with int64 values.

    cub/device/dispatch/dispatch_radix_sort.cuh (`InvokeOnesweep`): 256 counts for each 8 bits of
    the keys, a table that blocks read from each other, and both arrays once more where there is
    more than one pass. The number of keys that a block sorts at a time, its tile, was seen on the
    null GPU, as was that up to 2,048 keys are sorted by a single block.
    """
    if n <= 2048:
        return (1,)
    passes = math.ceil(max(1, largest.bit_length()) / 8)
    tile = 3840 if limits.capability < (9, 0) else 4608
    arrays = 0
    if passes > 1:
        arrays = 2 * ceil_to(n * INDEX, 256)
    return (arrays + passes * 256 * INDEX + math.ceil(n / tile) * 1024 + 256 + 255,)


def _embedding(args: tuple, limits: Limits) -> Inside:
    """Embedding.cpp (`embedding_symint`): indices of two and more dimensions become contiguous."""
    return Inside((contiguous_copies(args[1]),)) if args[1].dim() > 1 else NOTHING


def _embedding_backward(args: tuple, limits: Limits) -> Inside:
    """cuda/Embedding.cu (`embedding_dense_backward_cuda`) and EmbeddingBackwardKernel.cu: more than
    3,072 indices are sorted; gradients of equal indices are added up ten at a time, in fp32, and
    then by index. Of a small table whose rows are frequent, the sums of ten are added to the table
    at once, for 16 bits in a table of fp32; which tables these are was seen on the null GPU."""
    grad, indices, rows = args[:3]
    n, width = indices.numel(), grad.shape[-1]
    copies = contiguous_copies(indices, grad)
    if n <= 3072:
        return Inside((copies,))
    numbers, segments = n * INDEX, min(n, rows)
    kept = (*copies, numbers, numbers)
    sorting = (*kept, numbers, *_sorted_pairs(n, rows, limits))
    parts = n // 10 + segments
    starts, partial = segments * INDEX, parts * INDEX
    sums: Stage = (parts * width * accumulate_bytes(grad.dtype),)
    few = segments * math.ceil(width / 1024) < 4 * limits.multiprocessors
    if few and parts >= 4 * segments:
        sums = (partial,)
        if grad.dtype.itemsize < 4:
            sums = (partial, rows * width * 4)
    counted = (*kept, numbers, INDEX)
    after = (
        (*counted, numbers, SCAN),
        (*counted, starts, starts, SCAN),
        (*counted, starts, starts, INDEX, partial, *sums),
    )
    return Inside((sorting, kept), after)


def _index_put(args: tuple, limits: Limits) -> Inside:
    """cuda/Indexing.cu (`index_put_with_sort_kernel`): where values accumulate, the linear indices
    and their places, both once more sorted."""
    if len(args) < 4 or not args[3]:
        return NOTHING
    x, indices, values = args[:3]
    n = max(index.numel() for index in indices if index is not None)
    numbers, copy = n * INDEX, contiguous_copies(values)
    temporary = _sorted_pairs(n, x.numel(), limits)
    after = (INDEX, INDEX, 1), (numbers, numbers), (numbers,) * 4 + copy + temporary
    return Inside(after=after)


def _depthwise(weight: Tensor, groups: int) -> bool:
    """Whether PyTorch's own kernel convolves, which copies nothing."""
    return groups > 1 and weight.shape[1] == 1


def _convolution(args: tuple, limits: Limits) -> Inside:
    """cudnn/ConvShared.cpp (`cudnn_convolution_forward`): operands become contiguous alike, and
    channels last if one is so (`cudnn_conv_suggest_memory_format`)."""
    x, weight = args[:2]
    if _depthwise(weight, args[8]):
        return NOTHING
    return Inside(after=(contiguous_copies(x, weight, layout=suggested(x, weight)),))


def _convolution_backward(args: tuple, limits: Limits) -> Inside:
    """cudnn/ConvShared.cpp (`cudnn_convolution_backward`), then Convolution.cpp: the bias's
    gradient is a sum over pictures and places."""
    grad, x, weight = args[:3]
    layout = suggested(x, weight)
    kept: Stage = ()  # while the other gradients are computed
    others: Stage = ()
    if not _depthwise(weight, args[9]):
        kept = contiguous_copies(grad, layout=layout)
        others = contiguous_copies(x, weight, layout=layout)
    of_bias: Stage = ()
    if args[10][2]:
        dims = [0, *range(2, grad.dim())]
        of_bias = staging(grad, dims, accumulate_bytes(grad.dtype), limits)
    return Inside((kept + others, kept), (kept, of_bias))


def returned(func: OpOverload, args: tuple, out: object) -> object:
    """What an operator returns on CUDA, given what it returns on a CPU.

    Layer norm's statistics of 16-bit inputs are in fp32 there (cuda/layer_norm_kernel.cu), and
    cuDNN's convolutions return channels last where an operand is so.
    """
    if func in cuda_reductions.LOSSES:
        return cuda_reductions.loss_returned(func, args, out)
    if func in cuda_distances.UNFOLDING:
        assert isinstance(out, Tensor)
        return cuda_distances.unfolding_returned(args[0], out)
    if func in CONVOLUTIONS:
        x, weight = args[CONVOLUTIONS[func] :][:2]
        depthwise = _depthwise(weight, args[8 + CONVOLUTIONS[func]])
        if suggested(x, weight) is torch.channels_last and not depthwise:
            return tree_map_only(Tensor, _channels_last, out)
    if func is aten.native_layer_norm.default:
        assert isinstance(out, tuple)
        normalised, mean, inverse_deviation = out
        return normalised, mean.float(), inverse_deviation.float()
    if func is aten._scaled_dot_product_efficient_attention.default:
        assert isinstance(out, tuple)  # the last two are numbers on the host
        return *out[:2], *(torch.empty_like(number, device="cpu") for number in out[2:])
    return out


def _channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x


# The place of the image among a convolution's arguments.
CONVOLUTIONS = {aten.convolution.default: 0, aten.convolution_backward.default: 1}
# The place of the argument that names the dimensions; operators of `WHOLE` reduce them all.
WHOLE = {aten.sum.default, aten.mean.default, aten.all.default, aten.any.default, aten.max.default}
SUMS = {aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim}
EXTREMES = {aten.amax.default, aten.amin.default, aten.max.default}
TRUTHS = {aten.all.default, aten.any.default, aten.all.dim, aten.any.dim}
WITH_PLACES = {aten.argmax.default, aten.argmin.default, aten.max.dim, aten.min.dim}
MOMENTS = {aten.var.correction, aten.var_mean.correction, aten.std.correction}
REDUCTIONS = dict.fromkeys(WHOLE | SUMS | EXTREMES | TRUTHS | WITH_PLACES | MOMENTS, 1)
REDUCTIONS[aten.linalg_vector_norm.default] = 2
OTHERS: dict[OpOverload, Callable[[tuple, Limits], Inside]] = {
    aten.logsumexp.default: _logsumexp,
    aten.isinf.default: _is_infinite,
    aten.native_layer_norm.default: cuda_layouts.layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten._scaled_dot_product_flash_attention.default: cuda_attention.flash_forward,
    aten._scaled_dot_product_efficient_attention.default: cuda_attention.efficient_forward,
    aten._safe_softmax.default: cuda_attention.safe_softmax,
    aten._softmax.default: cuda_layouts.softmax,
    aten._log_softmax.default: cuda_layouts.softmax,
    aten._softmax_backward_data.default: cuda_layouts.softmax_backward,
    aten._log_softmax_backward_data.default: cuda_layouts.log_softmax_backward,
    aten.native_batch_norm.default: cuda_layouts.batch_norm,
    aten.native_batch_norm_backward.default: cuda_layouts.batch_norm_backward,
    aten.embedding.default: _embedding,
    aten.embedding_dense_backward.default: _embedding_backward,
    aten.index_put.default: _index_put,
    aten.mse_loss.default: cuda_reductions.loss,
    aten.smooth_l1_loss.default: cuda_reductions.loss,
    aten.huber_loss.default: cuda_reductions.huber_loss,
    aten.binary_cross_entropy_with_logits.default: cuda_reductions.loss_of_logits,
    aten._pdist_backward.default: cuda_distances.pdist_backward,
    aten._cdist_backward.default: cuda_distances.cdist_backward,
    aten._euclidean_dist.default: cuda_distances.euclidean,
    aten.im2col.default: cuda_distances.unfold,
    aten.col2im.default: cuda_distances.fold,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
}
if hasattr(aten, "_fused_rms_norm_backward"):  # PyTorch 2.9
    OTHERS[aten._fused_rms_norm.default] = cuda_layouts.layer_norm
    OTHERS[aten._fused_rms_norm_backward.default] = cuda_layouts.layer_norm_backward
