"""From what callers pass to what the op computes with: autocast's promotion, integer masks, checks.

Every wrong argument is one readable line, before any work is done.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEFAULT_SCRATCH_BYTES = 64 * 2**20
BACKENDS = ("auto", "reference", "chunked", "triton")
# Argmax indices are kept in int16 at most.
LONGEST_SIDE = 32767
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Sides(NamedTuple):
    """The tensors that the op scores: I images and J texts."""

    image: Tensor  # [I, N, D]
    text: Tensor  # [J, M, D]
    token_mask: Tensor  # bool [J, M]
    image_mask: Tensor | None  # bool [I, N]; None: all are valid
    # Only s_t2i is wanted: what belongs to s_i2t (scores, gradients, argmax indices) is empty.
    one_way: bool = False
    own: int = 0  # so many images belong to each text, which is compared with these alone; 0: all

    def sizes(self) -> tuple[int, int]:
        """The numbers of images and of texts, I and J."""
        return len(self.image), len(self.text)

    def new_results(self, save_argmax: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Zeros for s_i2t, s_t2i [I, J] and the argmax indices [I, J, N], [I, J, M].

        The indices are empty unless `save_argmax`.
        """
        (I, J), N, M = self.sizes(), self.image.shape[-2], self.text.shape[-2]  # noqa: E741
        both, new = not self.one_way, self.image.new_zeros
        wide = torch.promote_types(self.image.dtype, torch.float32)
        of_tokens = (I, *self.text.shape[:-1]) if save_argmax else (0,)
        return (
            new((I, J) if both else (0,), dtype=wide),
            new((I, J), dtype=wide),
            new((I, J, N) if both and save_argmax else (0,), dtype=index_dtype(M)),
            new(of_tokens, dtype=index_dtype(N)),
        )


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
    refuse_other_derivatives("cmli_scores", image, text)
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


def refuse_other_derivatives(call: str, *features: Tensor) -> None:
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
                f"{call} has no derivative in forward mode or under torch.func: use backward() or "
                "torch.autograd.grad"
            )


def check_inputs(
    image: Tensor,
    text: Tensor,
    token_mask: Tensor,
    image_mask: Tensor | None,
    backend: str,
    scratch_bytes: int,
) -> None:
    """Raise ValueError or TypeError for the first thing wrong, from shapes and types alone."""
    tensors = {"image": image, "text": text, "token_mask": token_mask}
    if image_mask is not None:
        tensors["image_mask"] = image_mask
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, not {tensor.layout}")

    for name, tensor, legend in (("image", image, "[I, N, D]"), ("text", text, "[J, M, D]")):
        if tensor.ndim != 3:
            raise ValueError(
                f"{name} must have 3 dimensions {legend}, not shape {list(tensor.shape)}"
            )
        if 0 in tensor.shape:
            raise ValueError(f"{name} {legend} has an empty dimension: shape {list(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be float64, float32, bfloat16 or float16, not {tensor.dtype}"
            )
        if tensor.shape[1] > LONGEST_SIDE:
            raise ValueError(
                f"{name} {legend} has {tensor.shape[1]} positions; "
                f"at most {LONGEST_SIDE} are supported"
            )
    if image.dtype != text.dtype:
        raise TypeError(
            f"image is {image.dtype} and text is {text.dtype}: "
            "cast one of them, the dtypes must be equal"
        )
    if image.shape[-1] != text.shape[-1]:
        raise ValueError(
            f"image has D={image.shape[-1]} features and text has D={text.shape[-1]}: "
            "project both to one space first"
        )

    for name, mask, of, features in (
        ("token_mask", token_mask, "text", text),
        ("image_mask", image_mask, "image", image),
    ):
        if mask is None:
            continue
        if mask.dtype != torch.bool:
            raise TypeError(
                f"{name} must be a bool tensor with True = valid, or integers 0 and 1, not "
                f"{mask.dtype}: pass mask > 0 if it holds 0 and 1, but an additive mask is none"
            )
        if mask.shape != features.shape[:-1]:
            raise ValueError(
                f"{name} has shape {list(mask.shape)}; it must be that of the positions of {of}, "
                f"{list(features.shape[:-1])}"
            )
    for name, tensor in tensors.items():
        if tensor.device != image.device:
            raise ValueError(
                f"{name} is on {tensor.device} and image on {image.device}: move them to one device"
            )

    check_options(backend, scratch_bytes)


def check_options(backend: str, scratch_bytes: int) -> None:
    """Raise ValueError or TypeError if one of them is none."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; it must be one of {', '.join(BACKENDS)}")
    if not isinstance(scratch_bytes, int) or isinstance(scratch_bytes, bool):
        raise TypeError(f"scratch_bytes must be an int, not {type(scratch_bytes).__name__}")
    if scratch_bytes < 1:
        raise ValueError(f"scratch_bytes={scratch_bytes} must be positive")


def check_shapes(**tensors: tuple[Tensor, str]) -> None:
    """Raise ValueError unless each tensor has the shape next to it.

    `check_shapes(tokens=(x, "B M D"), mask=(y, "B M"))`: a letter is the same size everywhere.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, (tensor, legend) in tensors.items():
        shape, letters = list(tensor.shape), legend.split()
        expected = f"[{', '.join(letters)}]"
        if len(shape) != len(letters):
            raise ValueError(f"{name} must have shape {expected}, not {shape}")
        for size, letter in zip(shape, letters, strict=True):
            first, where = sizes.setdefault(letter, (size, name))
            if size != first:
                raise ValueError(
                    f"{name} has shape {shape}, {expected}: "
                    f"{letter} is {size}, but {first} in {where}"
                )


def index_dtype(length: int) -> torch.dtype:
    """The dtype that indexes a side of this length in the saved argmax indices."""
    return torch.uint8 if length <= 256 else torch.int16
