"""The backend's two functions for packed sides too, which its kernels take as padded ones.

The kernels skip the tiles that hold no valid position, so that padding costs memory alone.
"""

from torch import Tensor

from ds_cmli.cmli.inputs import Sides, Wanted, index_dtype
from ds_cmli.cmli.sequences import packings, padded
from ds_cmli.cmli.triton import backend


def forward(
    sides: Sides, scratch_bytes: int, save_argmax: bool, kept: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the results that `Sides.new_results` describes; arguments as of `backend.forward`."""
    of_images, of_texts = packings(sides)
    s_i2t, s_t2i, arg_i2t, arg_t2i = backend.forward(
        padded(sides, of_images, of_texts), scratch_bytes, save_argmax, kept
    )
    if save_argmax and of_texts is not None:
        arg_t2i = of_texts.pack(arg_t2i, len(sides.text), 1)
    if save_argmax and of_images is not None:
        arg_t2i = arg_t2i.to(index_dtype(len(sides.image)))
    return s_i2t, s_t2i, arg_i2t, arg_t2i


def backward(
    sides: Sides,
    grads: tuple[Tensor, Tensor],
    argmax: tuple[Tensor, Tensor],
    wanted: Wanted,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of image and text; arguments as of `backend.backward`."""
    of_images, of_texts = packings(sides)
    arg_i2t, arg_t2i = argmax
    if of_texts is not None and arg_t2i.numel():
        arg_t2i = of_texts.pad(arg_t2i, 1)
    d_image, d_text = backend.backward(
        padded(sides, of_images, of_texts), grads, (arg_i2t, arg_t2i), wanted, scratch_bytes
    )
    if of_images is not None and wanted.image:
        d_image = of_images.pack(d_image, len(sides.image))
    if of_texts is not None and wanted.text:
        d_text = of_texts.pack(d_text, len(sides.text))
    return d_image, d_text
