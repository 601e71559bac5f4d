"""Pictures from files that nobody vouches for: which decoders run, how pixels become RGB.

S image size in pixels.
"""

import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from ds_cmli.data.bad import Refused
from ds_cmli.data.files import most_bytes, read_file
from ds_cmli.data.transforms import View, central_square, resized

# The decoders that may run, whatever a file is named: Pillow's own choice includes one that starts Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
TILE_WIDTH, TILE_LENGTH, BITS_PER_SAMPLE, SAMPLE_FORMAT = 322, 323, 258, 339  # TIFF's tags
SHARP = 2  # a decoder's own reduction leaves so many pixels for each one needed: it is coarser than resizing
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations in which width and height change places
# What is white in a mode of more than 8 bits. Where files use one mode for several ranges, it is the first of them that
# no pixel exceeds.
WHITE = {"I;16": (65535,), "I": (255, 65535, 2**31 - 1, 2**32 - 1), "F": (1, 255, 65535)}


@functools.cache
def formats() -> list[str]:
    """Those of `FORMATS` that this build of Pillow has."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def read_picture(
    path: Path, root: str, size: int, max_pixels: int, follow_symlinks: bool, view: View = central_square
) -> torch.Tensor:
    """The picture in a file as `load_image` gives it; arguments and errors are those of `read_file` and `decode`."""
    return decode(read_file(path, root, most_bytes(max_pixels), follow_symlinks), size, max_pixels, view)


def decode(content: bytes, size: int, max_pixels: int, view: View = central_square) -> torch.Tensor:
    """The picture in a file's content as `load_image` gives it: uint8 [3, size, size].

    Raises:
        Refused, OSError, and whatever a decoder raises at damaged data.
    """
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # the user's word counts above Pillow's own limit
    try:
        image = Image.open(io.BytesIO(content), formats=formats())
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        if isinstance(error, Image.DecompressionBombError):
            raise Refused(f"more pixels than data.max_pixels = {max_pixels}") from None
        raise Refused(f"cannot identify image file: none of {', '.join(formats())}") from None
    with image:
        for width, height in (image.size, (_tag(image, TILE_WIDTH, 1), _tag(image, TILE_LENGTH, 1))):
            if width * height > max_pixels:
                raise Refused(f"{width} x {height} pixels, more than data.max_pixels = {max_pixels}")
        return load_image(image, size, view)


def load_image(image: Image.Image, size: int, view: View = central_square) -> torch.Tensor:
    """Upright, RGB on white, the part that `view` chooses, resized (bicubic): uint8 [3, size, size].

    A JPEG that is not loaded yet is decoded at a reduced scale where the part has more than twice the pixels needed.
    """
    white = _white(image)
    unsigned = image.format == "TIFF" and _tag(image, SAMPLE_FORMAT, (1,)) == (1,)
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    box = view(*(image.size[::-1] if orientation in SIDEWAYS else image.size))
    # A picture to be turned is decoded whole: its last pixels, which may be reduced less, would become the first.
    scale = _reduce(image, min(box[2] - box[0], box[3] - box[1]) / size) if orientation == 1 else 1.0
    ImageOps.exif_transpose(image, in_place=True)
    if white:
        image = _to_8_bits(image, white, unsigned)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGB", image.size, "white")
        background.paste(image, mask=image.getchannel("A"))
        image = background
    if image.mode != "RGB":  # else it would be copied
        image = image.convert("RGB")
    left, top, right, bottom = (round(side / scale) for side in box)
    pixels = np.array(image)[top : max(bottom, top + 1), left : max(right, left + 1)]
    return resized(torch.from_numpy(pixels).permute(2, 0, 1), size)


def _reduce(image: Image.Image, ratio: float) -> float:
    """Have a JPEG decoded at 1/2, 1/4 or 1/8 of its scale; returns by how much it is reduced.

    `ratio`: pixels for each one needed, of which `SHARP` are left.
    """
    if not isinstance(image, JpegImageFile):
        return 1.0
    whole = image.width
    reduced = image.draft(None, tuple(max(1, int(side * SHARP / ratio)) for side in image.size))  # type: ignore
    return whole / reduced[1][2] if reduced else 1.0


def _tag(image: Image.Image, tag: int, default: Any) -> Any:
    """A TIFF's tag; the default for others."""
    return getattr(image, "tag_v2", {}).get(tag, default)


def _white(image: Image.Image) -> tuple[int, ...]:
    """The possible whites of a picture of more than 8 bits; () for the others."""
    if _tag(image, BITS_PER_SAMPLE, ()) == (12,):
        return (4095,)
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # their 16 bits, which Pillow has scaled
        return WHITE["I;16"]
    return WHITE.get(image.mode[:4], ())


def _to_8_bits(image: Image.Image, whites: tuple[int, ...], unsigned: bool) -> Image.Image:
    pixels = np.asarray(image)
    if unsigned and image.mode == "I":  # Pillow calls 32 bits signed either way
        pixels = pixels.view(np.uint32)
    most = pixels.max()
    if not np.isfinite(pixels).all():
        raise Refused("pixels that are not finite")
    white = next((w for w in whites if most <= w), whites[-1])
    scaled = pixels.astype(np.float32).clip(0, white)
    scaled *= 255 / white
    scaled += 0.5
    return Image.fromarray(scaled.astype(np.uint8))
