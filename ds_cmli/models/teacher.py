"""The frozen image-only teacher: patch features of a timm ViT, the targets of distillation.

It stays outside the engine: no optimizer state, no gradient buffers, not in checkpoints.
Shapes: B images, S image side in pixels, N patches of the student's grid, H_t the teacher's width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_cmli.common.errors import UserError
from ds_cmli.common.pretrained import reason
from ds_cmli.config.schema import TeacherConfig
from ds_cmli.models.image_encoder import PixelNorm, build_vit


@dataclass
class Targets:
    """Layer-normalised (no affine), without gradient."""

    cls: Tensor  # [B, H_t]
    patches: Tensor  # [B, N, H_t]


class Teacher(nn.Module):
    vit: Any  # timm's

    def __init__(self, config: TeacherConfig, image_size: int, grid: tuple[int, int]):
        """`grid`: the student's patch grid; the teacher's is resampled to it where they differ."""
        super().__init__()
        image = build_vit(
            "teacher.", config.model, config.weights, config.overrides, image_size, config.weights_partial
        )
        self.vit = image.vit
        unfit = f"teacher.model is {config.model!r}, whose blocks give no class token beside a grid of patches"
        if not hasattr(self.vit, "blocks") or not hasattr(getattr(self.vit, "patch_embed", None), "grid_size"):
            raise UserError(f"{unfit}: choose a plain ViT of timm")
        depth = len(self.vit.blocks)
        if not -depth <= config.block < depth:
            raise UserError(f"teacher.block is {config.block}: {config.model!r} has blocks 0 to {depth - 1}")
        self.block = config.block % depth
        # Later blocks, the final norm and the head are never used: do not hold them.
        self.vit.prune_intermediate_layers([self.block], prune_norm=True, prune_head=True)
        image.account()
        self.pixels = PixelNorm(self.vit)
        self.own_grid = tuple(self.vit.patch_embed.grid_size)
        self.grid = tuple(grid)
        self.width = self.vit.embed_dim
        self.requires_grad_(False)
        self.eval()
        try:  # one picture: what does not fit is one line now, and no traceback later
            found = self(torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8))
            fits = found.patches.shape == (1, grid[0] * grid[1], self.width) and found.cls.shape == (1, self.width)
            problem = "" if fits else f"gives {list(found.patches.shape)}"
        except Exception as error:
            problem = reason(error)
        if problem:
            raise UserError(f"{unfit} ({problem}): choose a plain ViT of timm")

    def train(self, mode: bool = True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Targets:
        """uint8 [B, 3, S, S] -> `Targets` in the teacher's precision."""
        dtype = next(self.vit.parameters()).dtype
        [(patches, prefix)] = self.vit.forward_intermediates(
            self.pixels(image, dtype),
            indices=[self.block],
            return_prefix_tokens=True,
            norm=False,
            output_fmt="NLC",
            intermediates_only=True,
        )
        if self.own_grid != self.grid:
            square = patches.transpose(1, 2).unflatten(2, self.own_grid)  # [B, H_t, rows, columns]
            square = F.interpolate(square.float(), size=self.grid, mode="bilinear", align_corners=False)
            patches = square.flatten(2).transpose(1, 2).to(dtype)
        # A block's raw output is unbounded where the final norm is missing: normalised, with no learned scale, the
        # student's own normalised features can reach it.
        normalise = lambda x: F.layer_norm(x.float(), (self.width,)).to(dtype)  # noqa: E731
        return Targets(normalise(prefix[:, 0]), normalise(patches))
