"""A GPU's kernels, where PyTorch would choose others for tensors without data.

They are registered with PyTorch, below autocast, where its own are. DeepSpeed's optimizers write
into tensors that they are given, and allocate nothing.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.memory_model import workspaces
from ds_cmli.memory_model.gpus import Gpu

aten = torch.ops.aten
# A build of torch without CUDA would take the parts of these operators in place of them.
WHOLE = ("silu_backward", "mish_backward", "_fused_rms_norm")
UPDATES = ("fused_adam", "fused_lion", "cpu_adam", "cpu_lion", "cpu_adagrad")


@contextmanager
def registered(gpu: Gpu) -> Iterator[None]:
    with torch.library._scoped_library("aten", "IMPL") as library:
        with warnings.catch_warnings():  # of a build with CUDA, which has kernels of its own
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            library.impl("linear", _linear, "AutogradCUDA")
            library.impl("scaled_dot_product_attention", partial(_attention, gpu), "AutogradCUDA")
            for name in WHOLE:  # tensors without data are answered before the kernel is called
                library.impl(name, torch.library.fallthrough_kernel, "CUDA")
        yield


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute as PyTorch's aten/src/ATen/native/Linear.cpp does for plain tensors. For a subclass,
    such as tensors without data, it would keep the product besides its sum with the bias."""
    columns = weight.t()
    if bias is None:
        return torch.matmul(x, columns)
    if x.dim() == 2:
        return torch.addmm(bias, x, columns)
    if x.dim() > 2 and x.is_contiguous():
        return torch.addmm(bias, x.flatten(0, -2), columns).unflatten(0, x.shape[:-1])
    return torch.matmul(x, columns).add_(bias)


def _attention(
    gpu: Gpu, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options
):
    """Call the kernel that `_fused_sdp_choice` chooses on the GPU."""
    scale = options.get("scale")
    enable_gqa = options.get("enable_gqa", False)
    inputs = query, key, value, attn_mask, dropout_p, is_causal
    kernel = workspaces.attention_kernel(*inputs, enable_gqa, gpu)
    if kernel == workspaces.FLASH:
        width = query.shape[-1]
        if width % 8:  # PyTorch pads the heads to a multiple of 8 and scales as without
            scale = width**-0.5 if scale is None else scale
            query, key, value = (F.pad(x, (0, -width % 8)) for x in (query, key, value))
        out = aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
        return out[..., :width] if width % 8 else out
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attended = query.new_zeros(())
        left_out = query.new_full((), -math.inf)
        attn_mask = torch.where(attn_mask, attended, left_out)
    if kernel == workspaces.MATH:
        inputs = query, key, value, attn_mask, dropout_p, is_causal
        return aten._scaled_dot_product_attention_math(*inputs, **options)[0]
    if attn_mask is not None:
        # The kernel needs rows that begin at multiples of 8 elements; PyTorch's `preprocess_mask`
        # copies other masks.
        if any(stride % 8 for stride in attn_mask.stride()[:-1]) or attn_mask.stride(-1) != 1:
            width = attn_mask.shape[-1]
            attn_mask = F.pad(attn_mask, (0, 8 - width % 8))[..., :width]
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, grad, dropout_p, is_causal, scale=scale
    )[0]


class _Kernels:
    def __getattr__(self, name: str) -> Callable[..., int]:
        return lambda *_, **__: 0


def load_without_kernels(load: Callable) -> Callable:
    """Replace `OpBuilder.load` of DeepSpeed, which compiles for a GPU, by kernels of no effect."""

    def run(self, verbose: bool = False) -> object:
        return _Kernels() if self.name in UPDATES else load(self, verbose)

    return run
