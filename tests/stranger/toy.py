"""An image encoder of a plugin, as a stranger would write it. B images, N patches of 14 x 14 pixels, width H = 32."""

import torch
from torch import Tensor, nn

from ds_cmli.config.registry import IMAGE

IMAGE["toy"] = f"{__name__}:Toy"


class Toy(nn.Module):
    mean = (0.5, 0.5, 0.5)
    std = (0.25, 0.25, 0.25)
    width = 32

    def __init__(self, name: str, image_size: int, weights: str, layers: int | None, overrides: dict):
        super().__init__()
        self.grid = image_size // 14, image_size // 14
        self.cls = nn.Parameter(torch.zeros(1, 1, self.width))
        self.patches = nn.Conv2d(3, self.width, 14, 14)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(self.width, 4, batch_first=True) for _ in range(layers or 3)
        )

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, pixels: Tensor) -> Tensor:  # [B, 1 + N, H], the class token first
        patches = self.patches(pixels).flatten(2).mT
        x = torch.cat([self.cls.expand(len(patches), -1, -1), patches], 1)
        for layer in self.layers:
            x = layer(x)
        return x
