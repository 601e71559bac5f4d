"""Pictures from files that nobody vouches for: which files are opened, which decoders run, how pixels become RGB.

S image size in pixels.
"""

import functools
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

# The decoders that may run, whatever a file is named: Pillow's own choice includes one that starts Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
TILE_WIDTH, TILE_LENGTH, BITS_PER_SAMPLE, SAMPLE_FORMAT = 322, 323, 258, 339  # TIFF's tags
# What is white in a mode of more than 8 bits. Where files use one mode for several ranges, it is the first of them that
# no pixel exceeds.
WHITE = {"I;16": (65535,), "I": (255, 65535, 2**31 - 1, 2**32 - 1), "F": (1, 255, 65535)}


@functools.cache
def formats() -> list[str]:
    """Those of `FORMATS` that this build of Pillow has."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


class Refused(ValueError):
    """Why a picture is not read, in words for the user."""


def read_picture(path: Path, root: str, size: int, max_pixels: int, follow_symlinks: bool) -> torch.Tensor:
    """The picture in a file as `load_image` gives it: uint8 [3, size, size].

    Args:
        root: the data folder, without symlinks; files outside of it are refused unless `follow_symlinks`.

    Raises:
        Refused, OSError, and whatever a decoder raises at damaged data.
    """
    if not follow_symlinks and not inside(path, root):
        raise Refused("a symlink out of the data folder: data.follow_symlinks=true allows it")
    # Asked before it is opened, which devices may answer to, and again of what has been opened.
    if not stat.S_ISREG(path.stat().st_mode):
        raise Refused("no regular file")
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Refused("no regular file")
        if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
            Image.MAX_IMAGE_PIXELS = max_pixels  # the user's word counts above Pillow's own limit
        try:
            image = Image.open(file, formats=formats())
        except (UnidentifiedImageError, Image.DecompressionBombError) as error:
            if isinstance(error, Image.DecompressionBombError):
                raise Refused(f"more pixels than data.max_pixels = {max_pixels}") from None
            raise Refused(f"cannot identify image file: none of {', '.join(formats())}") from None
        with image:
            for width, height in (image.size, (_tag(image, TILE_WIDTH, 1), _tag(image, TILE_LENGTH, 1))):
                if width * height > max_pixels:
                    raise Refused(f"{width} x {height} pixels, more than data.max_pixels = {max_pixels}")
            return load_image(image, size)


def inside(path: Path, root: str) -> bool:
    """Whether the file lies in `root` with all symlinks followed."""
    return Path(os.path.realpath(path)).is_relative_to(root)


def load_image(image: Image.Image, size: int) -> torch.Tensor:
    """Upright, RGB on white, shorter side resized to `size` (bicubic), centre cropped: uint8 [3, size, size]."""
    white = _white(image)
    unsigned = image.format == "TIFF" and _tag(image, SAMPLE_FORMAT, (1,)) == (1,)
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
    image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


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
