"""Which kernel CUDA's attention takes."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.backends import cuda

from ds_cmli.memory_model.gpus import Limits
from ds_cmli.memory_model.inside import HALF

FLASH, EFFICIENT, MATH, CUDNN = "flash", "efficient", "math", "cuDNN"
SMALL = ((8, 6), (8, 9), (12, 0))  # compute capabilities with less shared memory than others have


def deterministic() -> bool:
    """Whether the program takes no kernels that add in an order of chance."""
    strict = not torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled() and strict


class Attention(NamedTuple):
    """The arguments of `F.scaled_dot_product_attention` on which its kernel depends.

    Args:
        query: [B, H, S, D]; key: [B, H, T, D]; value: [B, H, T, E]; other numbers of dimensions
            are for the math kernel.
        grouped: `enable_gqa`, by which several heads of the query share one of key and value.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    dropout: float = 0.0
    causal: bool = False
    grouped: bool = False

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @property
    def trained(self) -> bool:
        return torch.is_grad_enabled() and any(x.requires_grad for x in self.inputs)

    def of_type(self, *dtypes: torch.dtype) -> bool:
        return self.query.dtype in dtypes and len({x.dtype for x in self.inputs}) == 1

    def fused(self, grouped: bool, single: bool) -> bool:
        """Whether sizes and strides are those of the fused kernels.

        Args:
            grouped: whether each head of the query may have a head of key and value for itself, or
                one for several.
            single: whether one feature may have any stride.
        """
        if any(x.dim() != 4 for x in self.inputs) or 0 in (self.query.shape[2], self.key.shape[2]):
            return False
        if len({x.shape[0] for x in self.inputs}) > 1:
            return False
        heads = self.query.shape[1]
        shared = [heads // (x.shape[1] or 1) if grouped else 1 for x in self.inputs]
        if any(x.shape[1] * times != heads for x, times in zip(self.inputs, shared, strict=True)):
            return False
        rows = all(x.stride(-1) == 1 for x in self.inputs) or (single and self.query.shape[-1] == 1)
        return rows and (self.mask is None or self.mask.stride(-1) == 1)


def _flash(call: Attention, limits: Limits) -> bool:
    width = call.query.shape[-1]
    if limits.capability < (8, 0) or not call.of_type(*HALF) or call.mask is not None:
        return False
    if width > 256 or any(x.shape[-1] != width for x in call.inputs):
        return False
    if call.causal and call.query.shape[-2] != call.key.shape[-2]:
        return False
    backward = width <= 192 or (width > 224 and not call.dropout)
    if limits.capability in SMALL and call.trained and not backward:
        return False
    together = call.key.shape[1:2] == call.value.shape[1:2]
    return call.fused(call.grouped and together, single=True)


def _efficient(call: Attention, limits: Limits) -> bool:
    ampere = limits.capability >= (8, 0)
    multiple = 1
    if call.query.dtype in HALF:
        multiple = 8
    elif ampere:
        multiple = 4
    width, of_values = call.query.shape[-1], call.value.shape[-1]
    if not width or not of_values or width % multiple or of_values % multiple:
        return False
    types = [torch.float16, torch.float32]
    if ampere:
        types.append(torch.bfloat16)
    if ampere and any(x.storage_offset() % multiple and x.numel() for x in call.inputs):
        return False
    same = call.key.shape[-1] == width
    return same and call.of_type(*types) and call.fused(grouped=False, single=False)


def _cudnn(call: Attention, limits: Limits) -> bool:
    if limits.capability < (8, 0) or not call.of_type(*HALF) or (16 * call.dropout) % 1:
        return False
    if deterministic() or not call.fused(call.grouped, single=True) or not _maskable(call):
        return False
    queries, keys = call.query.shape[2], call.key.shape[2]
    if keys == 1 or (call.dropout and queries == 1):
        return False
    widths = call.query.shape[3], call.value.shape[3]
    if limits.capability == (10, 0) and widths == (192, 128):
        return True
    most = 256 if limits.capability == (9, 0) else 128
    return all(width <= most and not width % 8 for width in widths)


def _maskable(call: Attention) -> bool:
    """Whether cuDNN takes the mask."""
    mask = call.mask
    if mask is None:
        return True
    shape = (*call.query.shape[:3], *call.key.shape[2:3])
    if mask.dim() not in (2, 4) or mask.requires_grad:
        return False
    last = shape[-mask.dim() :]
    return all(size in (1, whole) for size, whole in zip(mask.shape, last, strict=True))


# By PyTorch's numbers of them: the kernel, whether the program has it on, and its rules.
Rule = Callable[[Attention, Limits], bool]
KERNELS: dict[int, tuple[str, Callable[[], bool], Rule]] = {
    1: (FLASH, cuda.flash_sdp_enabled, _flash),
    2: (EFFICIENT, cuda.mem_efficient_sdp_enabled, _efficient),
    0: (MATH, cuda.math_sdp_enabled, lambda call, limits: True),
    3: (CUDNN, cuda.cudnn_sdp_enabled, _cudnn),
}
FLASH_FIRST, CUDNN_FIRST = [1, 2, 0, 3, 4], [3, 1, 2, 0]


def chosen(call: Attention, limits: Limits) -> str:
    """The kernel that `F.scaled_dot_product_attention` takes.

    Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (`select_sdp_backend`) of PyTorch
    2.13 with cuDNN 9.20. As there, a `RuntimeError` is raised where the program has turned off all
    kernels that could run.
    """
    order = torch._C._get_sdp_priority_order()
    if order == FLASH_FIRST and limits.capability[0] in (9, 10):
        order = CUDNN_FIRST
    for kernel, enabled, possible in (KERNELS[number] for number in order if number in KERNELS):
        if enabled() and possible(call, limits):
            return kernel
    raise RuntimeError("No available kernel. Aborting execution.")


def without_cudnn(call: Attention, limits: Limits) -> str:
    """PyTorch's own kernel for a call that cuDNN's attention takes."""
    return next(name for name, _, possible in KERNELS.values() if possible(call, limits))
