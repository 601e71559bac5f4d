"""Which part of a picture a sample shows, and random augmentation. S image size in pixels, W x H a picture's own.

What is random is a pure function of (seed, turn, index), turn being how often the sample has been asked for before, so
that a run goes on with the same views on any number of ranks and loading processes. A batch has one view of each
picture, which student and teacher both see.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Box = tuple[int, int, int, int]  # left, top, right, bottom
View = Callable[[int, int], Box]  # of a picture's width and height


def central_square(width: int, height: int) -> Box:
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def resized(pixels: Tensor, size: int) -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, S, S], contiguous, bicubic with antialiasing.

    As Pillow's, but for the last bit, in a fifth of its time.
    """
    square = torch.nn.functional.interpolate(pixels[None], (size, size), mode="bicubic", antialias=True)[0]
    return square.contiguous()


class Augmentation:
    """The transforms that `DataConfig.augmentation` names, each with its strength."""

    def __init__(self, strengths: Mapping[Any, float], seed: int):
        self.strengths, self.seed = dict(strengths), seed

    @contextmanager
    def seeded(self, turn: int, index: int) -> Iterator[None]:
        """Inside, what is random is that of the sample; the process's own generator is as before afterwards."""
        if not self.strengths:
            yield
            return
        digest = hashlib.blake2b(f"{self.seed} {turn} {index}".encode(), digest_size=7).digest()
        generator = torch.default_generator  # the CPU's alone: `torch.manual_seed` would set the GPU's too
        before = generator.get_state()
        generator.manual_seed(int.from_bytes(digest, "big"))
        try:
            yield
        finally:
            generator.set_state(before)

    def view(self, width: int, height: int) -> Box:
        """A random part of the picture, or its central square; see `View`."""
        least = self.strengths.get("random_resized_crop")
        if least is None:
            return central_square(width, height)
        from torchvision.transforms import RandomResizedCrop

        shape = torch.empty(3, height, width, device="meta")
        ratio = [3 / 4, 4 / 3]
        top, left, rows, columns = RandomResizedCrop.get_params(shape, scale=[least, 1.0], ratio=ratio)
        return left, top, left + columns, top + rows

    def pixels(self, image: Tensor) -> tuple[Tensor, bool]:
        """uint8 [3, S, S] -> the same with random colours and, where the second result says so, its sides swapped."""
        strength = self.strengths.get("color_jitter")
        if strength is not None:
            from torchvision.transforms.v2 import ColorJitter

            # Without the hue: captions name colours.
            image = ColorJitter(brightness=strength, contrast=strength, saturation=strength)(image)
        flipped = "horizontal_flip" in self.strengths and bool(torch.rand(()) < self.strengths["horizontal_flip"])
        return (image.flip(-1) if flipped else image), flipped
