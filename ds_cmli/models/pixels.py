"""The normalisation of pixels for an image encoder. Shapes: B images, S image side in pixels."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class PixelNorm(nn.Module):
    """Normalises uint8 pixels by the mean and standard deviation of the encoder's training, in its precision."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Iterable[float], std: Iterable[float]):
        """`mean` and `std` of each of the three colours, for pixel values from 0 to 1."""
        super().__init__()
        for name, given in (("mean", mean), ("std", std)):
            # Integers in units of 1/10000 of a pixel value: the model's cast to 16 bits would round a float buffer.
            value = torch.tensor(list(given))[:, None, None] * 255e4
            self.register_buffer(name, value.round().int(), persistent=False)

    def forward(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 [B, 3, S, S] -> `dtype` [B, 3, S, S]."""
        return ((image.float() * 1e4 - self.mean) / self.std).to(dtype)
