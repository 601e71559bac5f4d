"""From an image file to pixels: decoding, the part that is shown, resizing, random augmentation.

S image size in pixels. All randomness is a pure function of (seed, turn, index), where turn is how
often the sample has been requested before: a resumed run sees the same views on any number of ranks
and loading processes.
"""

import hashlib
import io
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ds_cmli.config.schema import AugmentationName, DataConfig, Interpolation, Resize

# The decoders that may run, whatever a file's name is, as far as this build of Pillow has them. Its
# default includes one that starts Ghostscript.
Image.init()
FORMATS = list(filter(Image.OPEN.get, ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")))
SHARP = 2  # a JPEG decoded at a reduced scale keeps so many pixels per output pixel along a side
MAX_FILE_BYTES = 2**30  # of an image; the largest that Pillow decodes has half of it, uncompressed
Box = tuple[int, int, int, int]  # left, top, right, bottom
Picture = str | Path | bytes | Image.Image | np.ndarray | Tensor  # a file, its content, or pixels


def read_image_file(path: Path) -> bytes:
    """Return the content of an image's file.

    Raises OSError and, for a pipe or device, whose reading may never end, ValueError.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    check_size(status.st_size)
    return path.read_bytes()


def check_size(num_bytes: int) -> None:
    """Raise ValueError if a file is too large to be an image."""
    if num_bytes > MAX_FILE_BYTES:
        raise ValueError(f"{num_bytes:,} bytes, more than an image may have ({MAX_FILE_BYTES:,})")


def black(size: int) -> Tensor:
    """Return the picture that replaces one that cannot be used: uint8 [3, S, S]."""
    return torch.zeros(3, size, size, dtype=torch.uint8)


@dataclass
class View:
    """Shows a part of an image as uint8 [3, S, S]; the settings are those of `DataConfig`."""

    size: int
    resize: Resize = "crop"
    interpolation: Interpolation = "bicubic"
    augmentation: Mapping[AugmentationName, float] = field(default_factory=dict)
    seed: int = 0

    @classmethod
    def of(cls, config: DataConfig, seed: int | None = None) -> "View":
        """Return the view of training with a seed, or of evaluation, where nothing is random."""
        view = cls(config.image_size, config.resize, config.interpolation)
        return view if seed is None else replace(view, augmentation=config.augmentation, seed=seed)

    def __call__(self, picture: Picture, turn: int = 0, index: int = 0) -> Tensor:
        """Show a picture; one in memory stays as it is.

        Decoders raise nearly any exception for damaged data.
        """
        if isinstance(picture, str | Path):
            picture = read_image_file(Path(picture))
        if isinstance(picture, bytes):
            try:
                image: Image.Image = Image.open(io.BytesIO(picture), formats=FORMATS)
            except UnidentifiedImageError:  # whose message has an address in memory
                raise ValueError(f"cannot identify image file: none of {FORMATS}") from None
        else:
            image = picture if isinstance(picture, Image.Image) else F.to_pil_image(picture)
            image = image.copy()
        with image, self.seeded(turn, index):
            return self.changed(self._resized(image))

    def changed(self, pixels: Tensor) -> Tensor:
        """Return uint8 [3, S, S] with random colours and a random flip."""
        if strength := self.augmentation.get("color_jitter"):  # no hue, as captions name colours
            pixels = v2.ColorJitter(strength, strength, strength)(pixels)
        share = self.augmentation.get("horizontal_flip")
        return pixels.flip(-1) if share is not None and torch.rand(()) < share else pixels

    @contextmanager
    def seeded(self, turn: int, index: int) -> Iterator[None]:
        if not self.augmentation:
            yield
            return
        digest = hashlib.blake2b(f"{self.seed} {turn} {index}".encode(), digest_size=7).digest()
        with torch.random.fork_rng(devices=[]):
            # `torch.manual_seed` would seed the GPU's too.
            torch.default_generator.manual_seed(int.from_bytes(digest, "big"))
            yield

    def part(self, width: int, height: int) -> Box:
        """Return the part that is shown of an image of this size."""
        if least := self.augmentation.get("random_resized_crop"):
            top, left, rows, columns = v2.RandomResizedCrop.get_params(
                torch.empty(3, height, width, device="meta"), [least, 1.0], [3 / 4, 4 / 3]
            )
            return left, top, left + columns, top + rows
        if self.resize.startswith("squash"):
            return 0, 0, width, height
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return left, top, left + side, top + side

    def _resized(self, image: Image.Image) -> Tensor:
        """Return the image upright, as RGB on white, cut and resized: uint8 [3, S, S]."""
        scale = 1.0
        box = None
        # A rotated image is decoded at full scale: the reduction is less exact at the last pixels,
        # which would become the first ones.
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            box = self.part(*image.size)
            if self.resize == "crop" and isinstance(image, JpegImageFile):
                # Decoded at 1/2, 1/4 or 1/8 scale, if `SHARP` pixels per output pixel are left.
                left, top, right, bottom = box
                ratio = min(right - left, bottom - top) / self.size
                full_width = image.width
                width, height = (max(1, int(pixels * SHARP / ratio)) for pixels in image.size)
                if reduced := image.draft(None, (width, height)):
                    _, (_, _, reduced_width, _) = reduced
                    scale = full_width / reduced_width
        ImageOps.exif_transpose(image, in_place=True)
        box = box or self.part(*image.size)
        pixels = torch.from_numpy(np.array(on_white(image))).permute(2, 0, 1)
        if self.resize.startswith("shortest") and "random_resized_crop" not in self.augmentation:
            return self._shortest(pixels)
        left, top, right, bottom = (round(side / scale) for side in box)
        part = pixels[:, top : max(bottom, top + 1), left : max(right, left + 1)]
        return self._scaled(part, (self.size, self.size))

    def _shortest(self, pixels: Tensor) -> Tensor:
        """Resize the shorter side to S and cut out the centre, as CLIP's processors do."""
        sides = pixels.shape[1:]
        rows, columns = (int(self.size * side / min(sides)) for side in sides)
        pixels = self._scaled(pixels, (rows, columns))
        if self.resize.endswith("_pillow"):
            return F.center_crop(pixels, [self.size]).contiguous()
        top = (rows - self.size) // 2
        left = (columns - self.size) // 2
        return pixels[:, top : top + self.size, left : left + self.size].contiguous()

    def _scaled(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        if self.resize.endswith("_pillow"):
            resampling = Image.Resampling[self.interpolation.upper()]
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize(size[::-1], resampling)
            return F.pil_to_tensor(image)
        # On uint8, which torchvision would cast: a fifth of Pillow's time, equal up to one bit.
        pixels = interpolate(pixels[None], size, mode=self.interpolation, antialias=True)[0]
        return pixels.contiguous()


def on_white(image: Image.Image) -> Image.Image:
    """Return an image as RGB, on white where it is transparent."""
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.float32) * (255 / 65535) + 0.5
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("pixels of more than 8 bits, whose range is not known")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGB", image.size, "white")
        background.paste(image, mask=image.getchannel("A"))
        return background
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy
