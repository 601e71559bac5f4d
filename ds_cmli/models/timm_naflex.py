"""timm's NaFlexViT, which takes pictures of any aspect (`data.aspect`).

With the override use_naflex, timm makes one of a ViT, of the same weights.
Shapes: B images, S image side in pixels, N patches, H width, a grid of h * w patches.
"""

from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed_nhwc
from timm.models.naflexvit import NaFlexVit, batch_patchify
from torch import Tensor, nn

from ds_cmli.config.validation import check
from ds_cmli.data.aspect import Grid, patch_mask
from ds_cmli.models import timm_model
from ds_cmli.models.backbone import ImageBackbone, ImageRequest, attended_to


def _problem(model: NaFlexVit) -> str:
    """Why a NaFlexViT cannot be used; "" if it can."""
    if model.rope is not None:
        return "it has rotary positions, whose angles timm makes picture by picture"
    embeds = model.embeds
    if embeds.pos_embed_type != "learned" or not embeds.is_linear:
        return "its patches have no table of learned positions"
    return ""


class TimmNaFlex(ImageBackbone):
    model: Any  # timm's

    @classmethod
    def takes(cls, request: ImageRequest) -> bool:
        model: Any = timm_model.sketch(request)
        return isinstance(model, NaFlexVit) and not _problem(model)

    def __init__(self, request: ImageRequest):
        super().__init__()
        # timm resamples no positions of NaFlexViTs when it loads them.
        created = timm_model.create(request, sized=request.weights == "random")
        model: Any = created.model
        self.model = model
        if not isinstance(model, NaFlexVit):
            raise request.unfit("it is no NaFlexViT: give its overrides use_naflex=true")
        if problem := _problem(model):
            raise request.unfit(problem)
        height, width = self.patch = model.embeds.patch_size
        self.aspect_patch = height if height == width else 0
        timm_model.check_image_size(request, (height, width))
        self.depth = len(model.blocks)
        last = timm_model.last_block(request, self.depth, "block")
        need = "a NaFlexViT gives the features of one block: leave it out"
        check(request.average == 1, "teacher.average_blocks", request.average, need)
        timm_model.cut(model, last)
        created.account()
        self.has_class_token = model.embeds.cls_token is not None
        timm_model.tell(request, model, None if self.has_class_token else "the mean of patches")
        self.width = model.embed_dim
        self.prefix = model.num_prefix_tokens + (not self.has_class_token)
        self.grid = request.image_size // height, request.image_size // width
        embeds = self.model.embeds
        table = resample_abs_pos_embed_nhwc(embeds.pos_embed.detach(), list(self.grid))
        embeds.pos_embed = nn.Parameter(table.contiguous())
        self.mean, self.std = (self.model.pretrained_cfg[name] for name in ("mean", "std"))

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.blocks)

    def read_outside(self) -> Iterator[tuple[nn.Module, nn.Parameter]]:
        embeds = self.model.embeds
        for parameter in (embeds.pos_embed, embeds.cls_token, embeds.reg_token):
            if isinstance(parameter, nn.Parameter):
                yield self, parameter

    def forward(self, pixels: Tensor, grid: Tensor | None = None) -> Tensor:
        # What `NaFlexVit.forward_features` does, whose own positions of several grids would wait
        # for the GPU, or have no deterministic gradient.
        model, embeds = self.model, self.model.embeds
        patches, _ = batch_patchify(pixels, self.patch, channels_last=embeds.channels_last)
        if embeds.norm_input is not None:
            patches = embeds.norm_input(patches)
        x = embeds.norm(embeds.proj(patches))
        x = x + at_patches(embeds.pos_embed[0], self.grid, grid).to(x.dtype)
        first = [each for each in (embeds.cls_token, embeds.reg_token) if each is not None]
        x = torch.cat([*(each.expand(len(x), -1, -1) for each in first), x], 1)
        x = model.norm_pre(embeds.pos_drop(x))
        attended = attended_to(grid, patches.shape[1], model.num_prefix_tokens)
        for block in model.blocks:
            x = block(x, attn_mask=attended)
        if self.has_class_token:
            return x
        mask = patch_mask(grid, patches.shape[1])
        return torch.cat([mean_of(x[:, model.num_prefix_tokens :], mask), x], 1)


def mean_of(patches: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of the patches that there are: [B, N, H], bool [B, N] -> [B, 1, H]."""
    if mask is None:
        return patches.mean(1, keepdim=True)
    kept = patches.masked_fill(~mask[..., None], 0).sum(1, keepdim=True)
    return kept / mask.sum(1)[:, None, None].clamp(min=1)


def at_patches(table: Tensor, square: Grid, grid: Tensor | None, antialias: bool = False) -> Tensor:
    """The learned positions at the centres of each picture's patches, interpolated linearly.

    A picture of the table's own grid gets its entries. Patches past a grid get some of them too.

    Args:
        table: [rows, columns, H].
        square: the patches of a square picture; N is their product.
        grid: int64 [B, 2]; None: all are square, and B is 1.
        antialias: whether smaller grids average over the entries between their patches.

    Returns:
        fp32 [B, N, H].
    """
    table = table.float()
    if grid is None:
        grid = torch.tensor([square], device=table.device)
    columns = grid[:, 1:]  # [B, 1]
    number = torch.arange(square[0] * square[1], device=table.device)
    place = number // columns, number % columns  # [B, N] each
    sides = []
    for at, count, entries in zip(place, grid.unbind(1), table.shape, strict=False):
        scale = entries / count[:, None]
        centre = ((at + 0.5) * scale - 0.5).clamp(0, entries - 1)
        distance = (centre[..., None] - torch.arange(entries, device=table.device)).abs()
        if not antialias:
            sides.append((1 - distance).clamp(min=0))  # [B, N, entries]
            continue
        near = (1 - distance / scale.clamp(min=1)[..., None]).clamp(min=0)
        sides.append(near / near.sum(-1, keepdim=True))
    weights = sides[0][..., :, None] * sides[1][..., None, :]  # [B, N, rows, columns]
    return weights.flatten(2) @ table.flatten(0, 1)
