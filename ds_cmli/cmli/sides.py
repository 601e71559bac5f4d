"""Types and small helpers that the op, its kernels and the loss share. It imports torch alone.

Shapes: I images, J texts, N patches, M text positions (padded), D features.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Directions = tuple[Tensor, Tensor]  # image to text, text to image
SidePair = tuple[Tensor, Tensor]  # image, text
MAX_POSITIONS = 2**15 - 1  # of a side: an argmax index has 16 bits at most


class Sides(NamedTuple):
    image: Tensor  # [I, N, D]
    text: Tensor  # [J, M, D]
    token_mask: Tensor  # bool [J, M], True = valid
    patch_mask: Tensor | None = None  # bool [I, N]; None: all patches are valid


def checked_sides(sides: Sides) -> Sides:
    """Return the sides; under autocast, with both features in the wider dtype.

    Raises ValueError if shapes, dtypes or devices do not fit.
    """
    image, text = same_dtype(sides.image, sides.text)
    shapes = f"{list(image.shape)} and {list(text.shape)}"
    if not (image.ndim == text.ndim == 3 and image.shape[2] == text.shape[2]):
        raise ValueError(f"image [I, N, D] and text [J, M, D] do not fit: {shapes}")
    if 0 in (*image.shape[1:], *text.shape[1:]):
        raise ValueError(f"image and text {shapes} have no positions or no features")
    if max(image.shape[1], text.shape[1]) > MAX_POSITIONS:
        raise ValueError(f"image and text {shapes} may have {MAX_POSITIONS} positions at most")
    check_mask("token_mask", sides.token_mask, text)
    if sides.patch_mask is not None:
        check_mask("patch_mask", sides.patch_mask, image)
    return sides._replace(image=image, text=text)


def same_dtype(image: Tensor, text: Tensor) -> SidePair:
    """Return the features; under autocast, both in the wider dtype.

    Raises ValueError if they are not floats of one dtype on one device.
    """
    if image.dtype != text.dtype and torch.is_autocast_enabled(image.device.type):
        wider = torch.promote_types(image.dtype, text.dtype)
        image = image.to(wider)
        text = text.to(wider)
    if image.dtype != text.dtype or not image.is_floating_point() or image.device != text.device:
        kinds = f"{image.dtype} on {image.device} and {text.dtype} on {text.device}"
        raise ValueError(f"image and text must be floats of one dtype on one device, not {kinds}")
    return image, text


def check_mask(name: str, mask: Tensor, features: Tensor) -> None:
    shape = features.shape[:2]
    if mask.dtype != torch.bool or mask.shape != shape or mask.device != features.device:
        raise ValueError(
            f"{name} must be bool {list(shape)} on {features.device}, True = valid, "
            f"not {mask.dtype} {list(mask.shape)} on {mask.device}"
        )


def has_data(x: Tensor) -> bool:
    """Return False for the tensors of FakeTensorMode and of the device "meta"."""
    return not (isinstance(x, FakeTensor) or x.is_meta)


def upcast(x: Tensor) -> Tensor:
    """Cast floats to fp32; fp64 stays fp64."""
    return x.to(score_dtype(x))


def score_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of scores and of gradients that are added up: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def zero_gradient(x: Tensor) -> Tensor:
    """Return zeros of x's shape, in the dtype in which gradients are added up."""
    return x.new_zeros(x.shape, dtype=score_dtype(x))


def index_dtype(length: int) -> torch.dtype:
    """Return the dtype of argmax indices into a side of this length."""
    return torch.uint8 if length <= 256 else torch.int16


def power_of_two(n: int) -> int:
    """Return the least power of two that is at least n and at least 16, a product's least side."""
    return max(16, 1 << (n - 1).bit_length())


def slices(length: int, size: int) -> list[slice]:
    """Divide `length` into slices of `size`; the last one may be shorter."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Return a context without autocast, which would multiply fp32 matrices in 16 bits."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
