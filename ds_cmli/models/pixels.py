"""Pixels as an image encoder wants them. Shapes: B images, S image side in pixels."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class PixelNorm(nn.Module):
    """uint8 pixels -> the mean and standard deviation the encoder was trained with, in the encoder's precision."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Iterable[float], std: Iterable[float]):
        """Of the three colours, from 0 to 1."""
        super().__init__()
        for name, given in (("mean", mean), ("std", std)):
            # Integers, in 1/10000 of a pixel value: a float buffer would be rounded with the model's cast to 16 bit.
            value = torch.tensor(list(given))[:, None, None] * 255e4
            self.register_buffer(name, value.round().int(), persistent=False)

    def forward(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 [B, 3, S, S] -> [B, 3, S, S]."""
        return ((image.float() * 1e4 - self.mean) / self.std).to(dtype)
