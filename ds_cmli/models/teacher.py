"""The frozen image-only teacher: an image encoder whose features are the targets of distillation.

It is no part of DeepSpeed's engine nor of checkpoints.
Shapes: B images, S image side in pixels, N patches of the student's grid, H_t the teacher's width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_cmli.common import blame
from ds_cmli.config.registry import IMAGE, load
from ds_cmli.config.schema import TeacherConfig
from ds_cmli.models.encoders import PixelNorm
from ds_cmli.pretrained import loading


@dataclass
class Targets:
    """The teacher's features: layer-normalised without affine parameters, and without gradient."""

    cls: Tensor  # [B, H_t]
    patches: Tensor  # [B, N, H_t]


class Teacher(nn.Module):
    def __init__(self, config: TeacherConfig, image_size: int, grid: tuple[int, int]):
        """`grid`: the student's patch grid, to which the teacher's patches are resampled."""
        super().__init__()
        what = f"teacher.model is {config.model!r}, its weights {config.weights!r}"
        with loading(hub=config.weights == "hub"), blame(what):
            own = {"block": config.block, "overrides": config.overrides}
            encoder = load(IMAGE[config.backbone])
            self.image: Any = encoder(config.model, image_size, config.weights, **own)
        self.pixels = PixelNorm(self.image.mean, self.image.std)
        self.grid = tuple(grid)
        self.width = self.image.width
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Targets:
        """uint8 [B, 3, S, S] -> `Targets` in the teacher's precision."""
        dtype = next(self.image.parameters()).dtype
        x = self.image(self.pixels(image, dtype))  # [B, 1 + N of its own grid, H_t]
        cls, patches = x[:, 0], x[:, 1:]
        if self.image.grid != self.grid:
            square = patches.mT.unflatten(2, self.image.grid)  # [B, H_t, rows, columns]
            square = F.interpolate(square.float(), self.grid, mode="bilinear", align_corners=False)
            patches = square.flatten(2).transpose(1, 2).to(dtype)
        # Without the final norm a block's raw output is unbounded. The student's features come out
        # of a LayerNorm, so they can match targets that are normalised too, without a learned
        # scale.
        cls, patches = (F.layer_norm(part.float(), (self.width,)) for part in (cls, patches))
        return Targets(cls.to(dtype), patches.to(dtype))
