"""Cropping, resizing and random augmentation. S image size in pixels, W x H the picture's size.

All randomness is a pure function of (seed, turn, index), where turn is how often the sample has
been requested before. A resumed run thus continues with the same views on any number of ranks and
loading processes. A batch holds one view of each picture, which both student and teacher see.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ds_cmli.config.schema import AugmentationName as Name
from ds_cmli.config.schema import DataConfig, Interpolation, Resize
from ds_cmli.data.aspect import Grid, grid_of, naflex_grid

Box = tuple[int, int, int, int]  # left, top, right, bottom
PixelBox = tuple[float, float, float, float]  # the same, also between pixels
View = Callable[[int, int], Box]  # the part that is shown, given a picture's width and height


def central_square(width: int, height: int) -> Box:
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def whole(width: int, height: int) -> Box:
    return 0, 0, width, height


@dataclass(frozen=True)
class Framing:
    """What of a picture is shown where nothing is random, and how it becomes S x S pixels.

    Attributes are the settings of `DataConfig`: size is `image_size`, side is `side`.
    """

    size: int
    side: int = 0
    resize: Resize = "crop"
    interpolation: Interpolation = "bicubic"

    @classmethod
    def of(cls, config: DataConfig) -> "Framing":
        return cls(config.image_size, config.side, config.resize, config.interpolation)

    @property
    def by_pillow(self) -> bool:
        return self.resize.endswith("_pillow")

    def view(self, width: int, height: int) -> Box:
        if self.side or self.resize.startswith("squash"):
            return whole(width, height)
        return central_square(width, height)

    def grid(self, width: int, height: int) -> Grid:
        """The grid of patches for a picture, where pictures have any aspect."""
        if self.resize == "naflex":
            return naflex_grid(width, height, self.side, self.size // self.side)
        return grid_of(width, height, self.side)

    def resized(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        """Resize uint8 [3, H, W] to uint8 [3, *size], contiguous, with antialiasing.

        The result equals Pillow's up to the last bits, in a fifth of the time.
        """
        mode = self.interpolation
        if self.by_pillow:
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            image = image.resize(size[::-1], getattr(Image.Resampling, mode.upper()))
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        out = torch.nn.functional.interpolate(pixels[None], size, mode=mode, antialias=True)
        return out[0].contiguous()

    def shortest_resized(self, pixels: Tensor) -> Tensor:
        """Resize the shorter side to S and cut out the centre, as transformers or open_clip does.

        uint8 [3, H, W] -> uint8 [3, S, S].
        """
        height, width = pixels.shape[1:]
        shorter = min(height, width)
        rows, columns = int(self.size * height / shorter), int(self.size * width / shorter)
        left, top, _, _ = central_square(columns, rows)
        if self.by_pillow:  # as torchvision's CenterCrop, halves to even
            left, top = round((columns - self.size) / 2), round((rows - self.size) / 2)
        pixels = self.resized(pixels, (rows, columns))
        return pixels[:, top : top + self.size, left : left + self.size].contiguous()


class Augmentation:
    """The random transforms that `DataConfig.augmentation` names, each with its strength."""

    def __init__(self, strengths: Mapping[Name, float], seed: int, framing: Framing | None = None):
        """`framing`: what is shown without "random_resized_crop"; None: the central square."""
        self.strengths, self.seed = dict(strengths), seed
        self.framing = framing or Framing(1)

    @contextmanager
    def seeded(self, turn: int, index: int) -> Iterator[None]:
        """A context in which torch's CPU generator is seeded for the sample.

        Afterwards its state is restored.
        """
        if not self.strengths:
            yield
            return
        digest = hashlib.blake2b(f"{self.seed} {turn} {index}".encode(), digest_size=7).digest()
        # Only the CPU's generator; `torch.manual_seed` would seed the GPU's too.
        generator = torch.default_generator
        before = generator.get_state()
        generator.manual_seed(int.from_bytes(digest, "big"))
        try:
            yield
        finally:
            generator.set_state(before)

    def view(self, width: int, height: int) -> Box:
        """A `View`: a random part if "random_resized_crop" is set, else that of `Framing`."""
        least = self.strengths.get("random_resized_crop")
        if least is None:
            return self.framing.view(width, height)
        from torchvision.transforms import RandomResizedCrop

        top, left, rows, columns = RandomResizedCrop.get_params(
            torch.empty(3, height, width, device="meta"), scale=[least, 1.0], ratio=[3 / 4, 4 / 3]
        )
        return left, top, left + columns, top + rows

    def pixels(self, image: Tensor) -> tuple[Tensor, bool]:
        """Apply random colours and a random flip to uint8 [3, H, W].

        Also returns whether it was flipped.
        """
        strength = self.strengths.get("color_jitter")
        if strength is not None:
            from torchvision.transforms.v2 import ColorJitter

            # The hue is not changed, because captions name colours.
            image = ColorJitter(brightness=strength, contrast=strength, saturation=strength)(image)
        share = self.strengths.get("horizontal_flip")
        if share is not None and torch.rand(()) < share:
            return image.flip(-1), True
        return image, False
