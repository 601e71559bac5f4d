"""What `cmli_scores` accepts: every wrong argument becomes one readable line, before any work is done."""

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEFAULT_SCRATCH_BYTES = 64 * 2**20
BACKENDS = ("auto", "reference", "chunked", "triton")
# Argmax indices are kept in int16 at most.
LONGEST_SIDE = 32767


def check_inputs(
    image: Tensor, text: Tensor, token_mask: Tensor, image_mask: Tensor | None, backend: str, scratch_bytes: int
) -> None:
    """Raise ValueError or TypeError for the first thing wrong. Looks at shapes and types only, never at values."""
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
            raise ValueError(f"{name} must have 3 dimensions {legend}, not shape {list(tensor.shape)}")
        if 0 in tensor.shape:
            raise ValueError(f"{name} {legend} has an empty dimension: shape {list(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, not {tensor.dtype}")
        if tensor.shape[1] > LONGEST_SIDE:
            raise ValueError(f"{name} {legend} has {tensor.shape[1]} positions; at most {LONGEST_SIDE} are supported")
    if image.dtype != text.dtype:
        raise TypeError(f"image is {image.dtype} and text is {text.dtype}: cast one of them, the dtypes must be equal")
    if image.shape[2] != text.shape[2]:
        raise ValueError(
            f"image has D={image.shape[2]} features and text has D={text.shape[2]}: project both to one space first"
        )

    for name, mask, of, features in (
        ("token_mask", token_mask, "text", text),
        ("image_mask", image_mask, "image", image),
    ):
        if mask is None:
            continue
        if mask.dtype != torch.bool:
            raise TypeError(f"{name} must be a bool tensor with True = valid, not {mask.dtype}")
        if mask.shape != features.shape[:2]:
            raise ValueError(
                f"{name} has shape {list(mask.shape)}; it must be that of the positions of {of}, "
                f"{list(features.shape[:2])}"
            )
    for name, tensor in tensors.items():
        if tensor.device != image.device:
            raise ValueError(f"{name} is on {tensor.device} and image on {image.device}: move them to one device")

    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; it must be one of {', '.join(BACKENDS)}")
    if not isinstance(scratch_bytes, int) or isinstance(scratch_bytes, bool):
        raise TypeError(f"scratch_bytes must be an int, not {type(scratch_bytes).__name__}")
    if scratch_bytes < 1:
        raise ValueError(f"scratch_bytes={scratch_bytes} must be positive")


def index_dtype(length: int) -> torch.dtype:
    """The dtype that indexes a side of this length in the saved argmax indices."""
    return torch.uint8 if length <= 256 else torch.int16
