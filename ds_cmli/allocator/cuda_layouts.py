"""The copies that CUDA's operators make of operands whose layout their kernels do not read.

Paths are those below aten/src/ATen/native of PyTorch 2.13.
"""

import torch
from torch import Tensor

from ds_cmli.allocator.gpus import Limits
from ds_cmli.allocator.inside import Inside, contiguous_copies


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
