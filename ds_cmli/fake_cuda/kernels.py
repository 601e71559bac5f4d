"""A GPU's kernels: those that it chooses where a CPU chooses others, and those that do not run:
Triton's, and those that DeepSpeed compiles for its optimizers.

The last write into tensors that they are given and allocate nothing.
"""

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from ds_cmli.common.patches import patched
from ds_cmli.memory_model import attention_choice
from ds_cmli.memory_model.attention_choice import Attention
from ds_cmli.memory_model.gpus import Limits

aten = torch.ops.aten
INTO_GIVEN = {aten.mm.out, aten.bmm.out, aten.addmm.out, aten.addmm_.default}  # products
# A build of torch without CUDA would take the parts of these operators in place of them.
WHOLE = ["silu_backward", "mish_backward"]
if hasattr(aten, "_fused_rms_norm_backward"):  # PyTorch 2.9
    WHOLE.append("_fused_rms_norm")
IN_PLACE = ("fused_adam", "fused_lion", "cpu_adam", "cpu_lion", "cpu_adagrad")


class CudaOperators:
    """A GPU's operators, in place of those that a CPU chooses, which keep more for backward.

    Args:
        device: the type of device that tensors of the GPU have here.
    """

    def __init__(self, gpu: Limits, device: str):
        self.gpu, self.device = gpu, device

    @contextmanager
    def chosen(self) -> Iterator[None]:
        with (
            patched("torch: attention", partial(self._on_gpu, self._attention)),
            patched("torch: dropout", partial(self._on_gpu, _dropout)),
            torch.library._scoped_library("aten", "IMPL") as registered,
        ):
            with warnings.catch_warnings():  # of a build with CUDA, which has kernels of its own
                warnings.filterwarnings("ignore", "Warning only once for all operators")
                registered.impl("linear", _linear, "AutogradCUDA")
                registered.impl("one_hot", _one_hot, "CUDA")
                attention = "scaled_dot_product_attention"  # in compiled graphs
                registered.impl(attention, self._attention, "AutogradCUDA")
                for name in WHOLE:  # tensors without data are answered before the kernel is called
                    registered.impl(name, torch.library.fallthrough_kernel, "CUDA")
            yield

    def _on_gpu(self, ours: Callable[..., Tensor], theirs: Callable[..., Tensor]) -> Callable:
        """`ours` for tensors of the GPU, `theirs` for those of the host."""

        def chosen(*args, **kwargs) -> Tensor:
            first = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            return (ours if first.device.type == self.device else theirs)(*args, **kwargs)

        return chosen

    def _attention(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **gqa
    ):
        """The kernel that `_fused_sdp_choice` chooses on the GPU."""
        if torch.is_autocast_enabled(self.device):  # which casts for the operator as a whole
            # From the last argument on, as C++ calls functions.
            attn_mask, value, key, query = map(self._cast, (attn_mask, value, key, query))
        grouped = gqa.get("enable_gqa", False)
        call = Attention(query, key, value, attn_mask, dropout_p, is_causal, grouped)
        kernel = attention_choice.chosen(call, self.gpu)
        if kernel == attention_choice.CUDNN:
            kernel = attention_choice.without_cudnn(call, self.gpu)
        if kernel == attention_choice.FLASH:
            width = query.shape[-1]
            if width % 8:  # PyTorch pads the heads to a multiple of 8 and scales as without
                scale = width**-0.5 if scale is None else scale
                query, key, value = (F.pad(x, (0, -width % 8)) for x in (query, key, value))
            out = torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )[0]
            return out[..., :width] if width % 8 else out
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attended, left_out = query.new_zeros(()), query.new_full((), -math.inf)
            attn_mask = torch.where(attn_mask, attended, left_out)
        if kernel == attention_choice.MATH:
            return torch.ops.aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, **gqa
            )[0]
        if attn_mask is not None:
            # The kernel needs rows that begin at multiples of 8 elements; PyTorch's
            # `preprocess_mask` copies other masks.
            if any(stride % 8 for stride in attn_mask.stride()[:-1]) or attn_mask.stride(-1) != 1:
                width = attn_mask.shape[-1]
                attn_mask = F.pad(attn_mask, (0, 8 - width % 8))[..., :width]
            attn_mask = attn_mask.expand(
                query.shape[0], query.shape[1], query.shape[2], key.shape[2]
            )
        grad = query.requires_grad or key.requires_grad or value.requires_grad
        grad = grad and torch.is_grad_enabled()
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, grad, dropout_p, is_causal, scale=scale
        )[0]

    def _cast(self, x: Tensor | None) -> Tensor | None:
        if x is None or not x.is_floating_point() or x.dtype == torch.float64:
            return x
        return x.to(torch.get_autocast_dtype(self.device))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """PyTorch's aten/src/ATen/native/Linear.cpp, where, however, a subclass of a tensor, as those
    without data are, keeps the product in addition to its sum with the bias."""
    columns = weight.t()
    if bias is None:
        return torch.matmul(x, columns)
    if x.dim() == 2:
        return torch.addmm(bias, x, columns)
    if x.dim() > 2 and x.is_contiguous():
        return torch.addmm(bias, x.flatten(0, -2), columns).unflatten(0, x.shape[:-1])
    product = torch.matmul(x, columns)
    return product + bias if isinstance(bias, DTensor) else product.add_(bias)


def _one_hot(places: Tensor, classes: int = -1) -> Tensor:
    """PyTorch's aten/src/ATen/native/Onehot.cpp for tensors with data."""
    if classes < 0:
        classes = int(places.max().item()) + 1
    ones = places.new_zeros((*places.shape, classes))
    return ones.scatter_(-1, places.unsqueeze(-1), 1)


def _dropout(input, p=0.5, training=True, inplace=False):
    if inplace:
        return torch.dropout_(input, p, training)
    if training and 0 < p < 1:
        return torch.native_dropout(input, p, True)[0]
    return input


class _Kernels:
    """A compiled module whose functions do nothing."""

    def __getattr__(self, name: str) -> Callable[..., int]:
        return lambda *_, **__: 0


def leave_out_tritons(stack: ExitStack, replacement: Callable) -> None:
    """Run `replacement` in place of each kernel until `stack` ends, where Triton is installed."""
    if "triton" in sys.modules:  # torch has imported it
        stack.enter_context(patched("triton: kernels", lambda _: replacement))


def leave_out_deepspeeds(stack: ExitStack) -> None:
    """Compile none of these kernels until `stack` ends, if the program has imported DeepSpeed."""
    builder = sys.modules.get("deepspeed.ops.op_builder.builder")
    if builder is not None and builder.OpBuilder.load.__module__ != __name__:
        stack.enter_context(patched("deepspeed: kernels", _loading))


def _loading(load: Callable) -> Callable:
    def run(self, verbose: bool = False) -> object:
        return _Kernels() if self.name in IN_PLACE else load(self, verbose)

    return run
