"""Reading and decoding pictures from untrusted files.

It decides which files may be read and which decoders may run, and how pixels become RGB. S image
size in pixels.
"""

import functools
import io
import os
import stat
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from ds_cmli.config.schema import DataConfig
from ds_cmli.data.aspect import Grid, laid_out
from ds_cmli.data.bad import Refused
from ds_cmli.data.transforms import Box, Framing, View, central_square

# The decoders that may run, whatever a file's name is. Pillow's default includes one that starts
# Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
TILE_WIDTH, TILE_LENGTH, BITS_PER_SAMPLE, SAMPLE_FORMAT = 322, 323, 258, 339  # TIFF tags
# Decoding a JPEG at a reduced scale is coarser than resizing, so it leaves at least this many
# pixels per output pixel along each side.
SHARP = 2
# The pixel value of white in modes with more than 8 bits. Files use some modes for several ranges;
# the first range that no pixel exceeds is taken.
WHITE = {"I;16": (65535,), "I": (255, 65535, 2**31 - 1, 2**32 - 1), "F": (1, 255, 65535)}


def most_bytes(max_pixels: int) -> int:
    """An upper limit for a picture's file size: 16 bytes per pixel, and 1 MiB for metadata."""
    return 16 * max_pixels + 2**20


def read_file(path: Path, root: str, most: int, follow_symlinks: bool) -> bytes:
    """The content of a regular file.

    Args:
        root: the real path of the data folder; files outside of it are refused unless
            `follow_symlinks`.
        most: the maximum size in bytes; a longer file is refused.

    Raises:
        Refused: the file is not allowed, not regular, or too long.
        OSError: it cannot be read.
    """
    if not follow_symlinks and not inside(path, root):
        raise Refused("a symlink out of the data folder: data.follow_symlinks=true allows it")
    # Checked before opening, because opening a device can have side effects, and again on the
    # opened file.
    if not stat.S_ISREG(path.stat().st_mode):
        raise Refused("no regular file")
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise Refused("no regular file")
        check_bytes(status.st_size, most)
        return file.read()


def check_bytes(size: int, most: int) -> None:
    """Raise `Refused` if a picture's file is longer than any picture could be."""
    if size > most:
        raise Refused(f"{size:,} bytes, more than a picture of data.max_pixels takes")


def inside(path: Path, root: str) -> bool:
    """Whether the file lies in `root` once all symlinks are followed."""
    return Path(os.path.realpath(path)).is_relative_to(root)


@functools.cache
def formats() -> list[str]:
    """The formats of `FORMATS` that this build of Pillow supports."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def read_picture(
    path: Path, root: str, framing: Framing, max_pixels: int, follow_symlinks: bool
) -> Tensor:
    """Read and decode a file as `read_file` and `decode` do."""
    content = read_file(path, root, most_bytes(max_pixels), follow_symlinks)
    return decode(content, framing, max_pixels)


def decode(content: bytes, framing: Framing, max_pixels: int, view: View | None = None) -> Tensor:
    """Decode a file's content with `load_image`: uint8 [3, S, S], or of a grid's size.

    Raises:
        Exception: as `opened`; OSError, or any other that a decoder raises for damaged data.
    """
    with opened(content, max_pixels) as image:
        return load_image(image, framing, view)


def opened(content: bytes, max_pixels: int) -> Image.Image:
    """Open a picture, whose pixels are not decoded yet.

    Raises:
        Refused: the format is unknown, or the picture has more than `max_pixels` pixels.
        Exception: OSError, or any other exception that a decoder raises for damaged data.
    """
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # the user's setting overrides Pillow's own limit
    try:
        image = Image.open(io.BytesIO(content), formats=formats())
    except Image.DecompressionBombError:
        raise Refused(f"more pixels than data.max_pixels = {max_pixels}") from None
    except UnidentifiedImageError:
        raise Refused(f"cannot identify image file: none of {', '.join(formats())}") from None
    tile = _tag(image, TILE_WIDTH, 1), _tag(image, TILE_LENGTH, 1)
    for width, height in (image.size, tile):
        if width * height > max_pixels:
            image.close()
            raise Refused(f"{width} x {height} pixels, more than data.max_pixels = {max_pixels}")
    return image


def shown(content: bytes, config: DataConfig) -> tuple[Tensor, Grid | None]:
    """Decode a file's content as a batch takes it: uint8 [3, S, S], and the grid of any aspect.

    Errors are those of `decode`.
    """
    image = decode(content, Framing.of(config), config.max_pixels)
    return laid_out(image, config.aspect_patch, config.image_size)


def load_image(image: Image.Image, framing: Framing, view: View | None = None) -> Tensor:
    """Turn a picture upright, put it as RGB on white, crop it by `view` and resize it.

    A JPEG that is not loaded yet is decoded at 1/2, 1/4 or 1/8 scale if `SHARP` times the size
    needed is left, unless it is prepared as for another model (`framing.resize`), to the bit.

    Args:
        view: None: that of `framing`.

    Returns:
        uint8 [3, S, S], or [3, h * p, w * p] of the part's grid of h * w patches.
    """
    white, view = _white(image), view or framing.view
    unsigned = image.format == "TIFF" and _tag(image, SAMPLE_FORMAT, (1,)) == (1,)
    scale, box = 1.0, None
    # A rotated picture is decoded at full scale: the reduction is less exact at the last pixels,
    # which would become the first ones. Its size is known once it is upright: of a TIFF, Pillow
    # gives that from the start.
    if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
        box = view(*image.size)
        if framing.resize == "crop":
            height, width = _size(box, framing)
            scale = _reduce(image, min((box[2] - box[0]) / width, (box[3] - box[1]) / height))
    ImageOps.exif_transpose(image, in_place=True)
    box = box or view(*image.size)
    if white:
        image = _to_8_bits(image, white, unsigned)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGB", image.size, "white")
        background.paste(image, mask=image.getchannel("A"))
        image = background
    if image.mode != "RGB":  # `convert` would copy an RGB image
        image = image.convert("RGB")
    if framing.resize.startswith("shortest") and box == central_square(*image.size):
        return framing.shortest_resized(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    left, top, right, bottom = (round(side / scale) for side in box)
    pixels = np.array(image)[top : max(bottom, top + 1), left : max(right, left + 1)]
    return framing.resized(torch.from_numpy(pixels).permute(2, 0, 1), _size(box, framing))


def _size(box: Box, framing: Framing) -> tuple[int, int]:
    """Height and width in pixels that the part of a picture gets."""
    size, side = framing.size, framing.side
    if not side:
        return size, size
    rows, columns = framing.grid(box[2] - box[0], box[3] - box[1])
    return rows * size // side, columns * size // side


def prepare(picture: Image.Image | np.ndarray | Tensor, framing: Framing) -> Tensor:
    """Prepare a picture in memory as `load_image` does; it stays as it is.

    Args:
        picture: a PIL image; or uint8, an array [height, width] or [height, width, 1, 3 or 4], or
            a tensor [1, 3 or 4, height, width].

    Raises:
        TypeError: it is something else.
        Exception: as `decode`, for a PIL image whose file is damaged.
    """
    if isinstance(picture, Image.Image):
        return load_image(_copy(picture), framing)
    pixels = picture
    if isinstance(pixels, Tensor) and pixels.ndim == 3 and pixels.dtype == torch.uint8:
        pixels = pixels.detach().cpu().permute(1, 2, 0).numpy()
    if isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.size:
        if pixels.ndim == 3 and pixels.shape[2] == 1:
            pixels = pixels[:, :, 0]
        if pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4)):
            return load_image(Image.fromarray(np.ascontiguousarray(pixels)), framing)
    kind = type(picture).__name__
    if hasattr(picture, "dtype"):
        kind += f" {picture.dtype} {list(picture.shape)}"
    raise TypeError(
        f"a picture is {kind}: give a PIL image, a uint8 array [height, width, 3] or a uint8 "
        "tensor [3, height, width]"
    )


def _copy(image: Image.Image) -> Image.Image:
    """Copy an image for `load_image` to change, with all that the file says of its pixels.

    A file that is open and not decoded yet is opened again, so that it is decoded as in training.
    """
    file = getattr(image, "fp", None)
    if file is not None and image.tell() == 0:
        place = file.tell()
        file.seek(0)
        content = io.BytesIO(file.read())
        file.seek(place)
        others = [name for name in Image.OPEN if name == image.format]
        again = Image.open(content, formats=[*formats(), *others])
        if again.size == image.size:  # otherwise the caller has asked for a smaller scale
            return again
    upright = ImageOps.exif_transpose(image)
    upright.format = image.format
    return upright


def _reduce(image: Image.Image, ratio: float) -> float:
    """Make Pillow decode a JPEG at 1/2, 1/4 or 1/8 scale if possible; returns that factor.

    `ratio` is the number of pixels per output pixel along a side, of which at least `SHARP` are
    left.
    """
    if not isinstance(image, JpegImageFile):
        return 1.0
    whole = image.width
    width, height = (max(1, int(side * SHARP / ratio)) for side in image.size)
    reduced = image.draft(None, (width, height))  # type: ignore[arg-type]
    return whole / reduced[1][2] if reduced else 1.0


def _tag(image: Image.Image, tag: int, default):
    """The value of a TIFF tag; `default` for other formats or a missing tag."""
    return getattr(image, "tag_v2", {}).get(tag, default)


def _white(image: Image.Image) -> tuple[int, ...]:
    """The possible values of white in a picture with more than 8 bits; () for other pictures."""
    if _tag(image, BITS_PER_SAMPLE, ()) == (12,):
        return (4095,)
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # Pillow gives their pixels as 16 bits
        return WHITE["I;16"]
    return WHITE.get(image.mode[:4], ())


def _to_8_bits(image: Image.Image, whites: tuple[int, ...], unsigned: bool) -> Image.Image:
    pixels = np.asarray(image)
    if unsigned and image.mode == "I":  # Pillow reads 32-bit pixels as signed in any case
        pixels = pixels.view(np.uint32)
    most = pixels.max()
    if not np.isfinite(pixels).all():
        raise Refused("pixels that are not finite")
    white = next((value for value in whites if most <= value), whites[-1])
    scaled = pixels.astype(np.float32).clip(0, white)
    scaled *= 255 / white
    scaled += 0.5
    return Image.fromarray(scaled.astype(np.uint8))
