"""A plugin as a stranger would write it: a loss over all pairs, and an image encoder whose blocks mix all tokens.

Shapes: B images, S image side in pixels, N patches, H width.
"""

import torch
from torch import Tensor, nn

from ds_cmli.cmli import CMLILoss
from ds_cmli.config.registry import IMAGE, LOSSES, BackboneEntry, LossEntry
from ds_cmli.config.schema import LossConfig

PATCH, WIDTH, BLOCKS = 14, 32, 3
LOSSES["filip"] = LossEntry(f"{__name__}:Filip", scores="cmli", kind="contrastive")
IMAGE["mixers"] = BackboneEntry(f"{__name__}:Mixers", "a toy")


class Filip(CMLILoss):
    def __init__(self, config: LossConfig, student: nn.Module, teacher_width: int | None):
        super().__init__(0.05)


class Mixer(nn.Module):
    def __init__(self, tokens: int):
        super().__init__()
        self.norm, self.across, self.along = nn.LayerNorm(WIDTH), nn.Linear(tokens, tokens), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.norm(x).mT).mT
        return x + self.along(x).relu()


class Mixers(nn.Module):
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self, name: str, image_size: int, weights: str, layers: int | None, overrides: dict):
        super().__init__()
        if image_size % PATCH:
            raise ValueError(f"data.image_size is no multiple of {PATCH}")
        side = image_size // PATCH
        self.width, self.grid = WIDTH, (side, side)
        self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.mixers = nn.ModuleList(Mixer(1 + side * side) for _ in range(layers or BLOCKS))

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.mixers)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patches(pixels).flatten(2).mT  # [B, N, H]
        x = torch.cat([self.cls.expand(len(patches), -1, -1), patches], 1)
        for mixer in self.mixers:
            x = mixer(x)
        return x
