"""The copies that CUDA's operators make of operands whose layout their kernels do not read.

Paths are those below aten/src/ATen/native of PyTorch 2.13.
"""

import torch
from torch import Tensor
from torch._ops import OpOverload

from ds_cmli.memory_model.gpus import Limits
from ds_cmli.memory_model.inside import NOTHING, Inside, contiguous_copies

aten = torch.ops.aten
# Matrix products, with the places of the two matrices among the arguments.
MATRICES = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1, aten.baddbmm.default: 1}
TRANSFERS = (aten.copy_.default, aten._to_copy.default)  # between devices, or on one


def suggested(*tensors: Tensor) -> torch.memory_format:
    """Channels last if a tensor is so, and else contiguous."""
    for tensor in tensors:
        last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        if last and not tensor.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format


def layer_norm(args: tuple, limits: Limits) -> Inside:
    """cuda/layer_norm_kernel.cu (`layer_norm_cuda`, `_fused_rms_norm_cuda`)."""
    copy = contiguous_copies(args[0])
    return Inside((copy,), (copy,))


def layer_norm_backward(args: tuple, limits: Limits) -> Inside:
    """cuda/layer_norm_kernel.cu (`layer_norm_backward_cuda`, `_fused_rms_norm_backward_cuda`)."""
    grad, x = args[:2]
    return Inside((contiguous_copies(x),), (contiguous_copies(x, grad),))


def softmax(args: tuple, limits: Limits) -> Inside:
    """cuda/SoftMax.cu (`host_softmax`)."""
    return Inside(after=(contiguous_copies(args[0]),))


def log_softmax_backward(args: tuple, limits: Limits) -> Inside:
    """cuda/SoftMax.cu (`host_softmax_backward`)."""
    return Inside(after=(contiguous_copies(args[0], args[1]),))


def softmax_backward(args: tuple, limits: Limits) -> Inside:
    """cuda/SoftMax.cu (`softmax_backward_cuda_out`): gradient and output are multiplied first."""
    grad, out = args[:2]
    product = torch.empty_like(grad, device="meta")
    return Inside(after=((product.nbytes, *contiguous_copies(product, out)),))


def batch_norm(args: tuple, limits: Limits) -> Inside:
    """cudnn/BatchNorm.cpp (`cudnn_batch_norm`)."""
    copy = contiguous_copies(args[0], layout=suggested(args[0]))
    return Inside((copy,), (copy,))


def batch_norm_backward(args: tuple, limits: Limits) -> Inside:
    """cudnn/BatchNorm.cpp (`cudnn_batch_norm_backward`): the gradient is laid out as the input."""
    grad, x = args[:2]
    copies = contiguous_copies(grad, x, layout=suggested(x))
    return Inside((copies,), (copies,))


def transfer_copies(func: OpOverload, args: tuple, kwargs: dict) -> Inside:
    """The copy on the GPU that one of `TRANSFERS` makes where layout or type change on the way.

    Source: `copy_requires_temporaries` and `copy_kernel_cuda` of cuda/Copy.cu.
    """
    if func is aten.copy_.default:
        target, source = args[:2]
        to, waits = target.device, not (len(args) > 2 and args[2])
    else:
        source, to = args[0], torch.device(kwargs.get("device") or args[0].device)
        layout = kwargs.get("memory_format")
        target = torch.empty_like(
            source, device="meta", dtype=kwargs.get("dtype"), memory_format=layout
        )
        waits = not kwargs.get("non_blocking")
    same_type = target.dtype == source.dtype
    if to.type == source.device.type or (same_type and target.stride() == source.stride()):
        return NOTHING
    there = target if to.type == "cuda" else source  # the one on the GPU
    converts = not same_type and not waits  # otherwise types change on the host
    if there.is_contiguous() and not converts:
        return NOTHING
    of_type = source if to.type == "cuda" and not waits else target
    return Inside(after=((target.numel() * of_type.dtype.itemsize,),))


def operand_copies(func: OpOverload, args: tuple) -> Inside:
    """The copies that cuBLAS needs of operands that lie neither by rows nor by columns.

    Expanded gradients do. Source: `prepare_matrix_for_cublas` and `prepare_batch_matrix_for_cublas`
    of cuda/Blas.cpp.
    """
    first = MATRICES[func]
    copied = [x for x in args[first : first + 2] if not _as_it_lies(x)]
    return Inside(after=(tuple(x.numel() * x.dtype.itemsize for x in copied),))


def _as_it_lies(x: Tensor) -> bool:
    """Whether cuBLAS takes a matrix [..., rows, columns] as it lies in memory."""
    rows, columns = x.shape[-2:]
    down, along = x.stride()[-2:]
    by_rows = along == 1 and down >= max(1, columns)
    return by_rows or (down == 1 and along >= max(1, rows))
