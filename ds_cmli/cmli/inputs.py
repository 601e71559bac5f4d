"""From what callers pass to what the op computes with: autocast's promotion, integer masks,
checks."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ds_cmli.cmli.check import DEFAULT_SCRATCH_BYTES, check_inputs

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Sides(NamedTuple):
    """The tensors that the op scores: I images and J texts."""

    image: Tensor  # [I, N, D]
    text: Tensor  # [J, M, D]
    token_mask: Tensor  # bool [J, M]
    image_mask: Tensor | None  # bool [I, N]; None: all are valid


class Wanted(NamedTuple):
    """Which of the two gradients are needed."""

    image: bool
    text: bool


def accepted(
    image: Tensor,
    text: Tensor,
    token_mask: Tensor,
    image_mask: Tensor | None,
    backend: str = "auto",
    scratch_bytes: int = DEFAULT_SCRATCH_BYTES,
) -> Sides:
    """The first four arguments of `cmli_scores`, features of one dtype and masks of bool.

    Raises:
        TypeError, ValueError: the first thing that does not fit, in one line.
        RuntimeError: under a transformation of torch.func that differentiates, or in forward mode.
    """
    image, text = promoted(image, text)
    token_mask = boolean("token_mask", token_mask)
    image_mask = None if image_mask is None else boolean("image_mask", image_mask)
    check_inputs(image, text, token_mask, image_mask, backend, scratch_bytes)
    _refuse_other_derivatives(image, text)
    return Sides(image, text, token_mask, image_mask)


def promoted(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast both in the wider dtype: linear layers give 16 bits there, embeddings fp32."""
    if not all(isinstance(x, Tensor) and x.is_floating_point() for x in (image, text)):
        return image, text
    kind = image.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return image, text
    wider = torch.promote_types(image.dtype, text.dtype)
    return image.to(wider), text.to(wider)


def full_precision(device: torch.device) -> AbstractContextManager:
    """No autocast inside: it would run products of fp32 matrices in 16 bits."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def boolean(name: str, mask: Tensor) -> Tensor:
    """A mask of integers as bool; ValueError if one is neither 0 nor 1. CPU-GPU sync for
    integers."""
    if isinstance(mask, Tensor) and mask.dtype in INTEGERS:
        return _boolean(mask, name)
    return mask


# An operator, so that torch.compile and fake tensors do not look at the values.
@torch.library.custom_op("ds_cmli::boolean_mask", mutates_args=())
def _boolean(mask: Tensor, name: str) -> Tensor:
    other = mask[(mask != 0) & (mask != 1)]  # CPU-GPU sync
    if len(other):
        raise ValueError(
            f"{name} holds {other[0].item()}: integers in a mask must be 0 and 1, 1 = True"
        )
    return mask.bool()


@_boolean.register_fake
def _(mask, name):
    return torch.empty_like(mask, dtype=torch.bool)


def _refuse_other_derivatives(*features: Tensor) -> None:
    """Without this line, forward mode would find a derivative of zero."""
    if torch.compiler.is_compiling():
        return
    for x in features:
        transformed = forward_ad.unpack_dual(x).tangent is not None
        while torch._C._functorch.is_functorch_wrapped_tensor(x):
            transformed |= torch._C._functorch.is_gradtrackingtensor(x)
            x = torch._C._functorch.get_unwrapped(x)
        if transformed:
            raise RuntimeError(
                "cmli_scores has no derivative in forward mode or under torch.func: use backward() "
                "or torch.autograd.grad"
            )
