"""Cropping, resizing and random augmentation. S image size in pixels, W x H the picture's size.

All randomness is a pure function of (seed, turn, index), where turn is how often the sample has
been requested before. A resumed run thus continues with the same views on any number of ranks and
loading processes. A batch holds one view of each picture, which both student and teacher see.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ds_cmli.config.schema import AugmentationName as Name

Box = tuple[int, int, int, int]  # left, top, right, bottom
View = Callable[[int, int], Box]  # the part that is shown, given a picture's width and height


def central_square(width: int, height: int) -> Box:
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def whole(width: int, height: int) -> Box:
    return 0, 0, width, height


def usual_view(side: int) -> View:
    """What is shown of a picture where nothing is random; `side`: as `DataConfig.side`."""
    return whole if side else central_square


def resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 [3, H, W] to uint8 [3, *size], contiguous, bicubic with antialiasing.

    The result equals Pillow's up to the last bit, in a fifth of the time.
    """
    found = torch.nn.functional.interpolate(pixels[None], size, mode="bicubic", antialias=True)
    return found[0].contiguous()


class Augmentation:
    """The random transforms that `DataConfig.augmentation` names, each with its strength."""

    def __init__(self, strengths: Mapping[Name, float], seed: int, side: int = 0):
        self.strengths, self.seed, self.side = dict(strengths), seed, side

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
        """A `View`: a random part if "random_resized_crop" is set, else `usual_view`."""
        least = self.strengths.get("random_resized_crop")
        if least is None:
            return usual_view(self.side)(width, height)
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
