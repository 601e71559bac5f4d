"""timm's models with patch tokens in a plain stack of blocks: ViT, DeiT, BEiT, EVA, SigLIP.

Shapes: B images, S image side in pixels, N patches, H width.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_cmli.config.validation import check
from ds_cmli.models import timm_model
from ds_cmli.models.backbone import ImageBackbone, ImageRequest, with_mean


def _fits(model: Any) -> bool:
    return (
        isinstance(getattr(model, "blocks", None), nn.Sequential | nn.ModuleList)
        and hasattr(getattr(model, "patch_embed", None), "grid_size")
        and isinstance(getattr(model, "num_prefix_tokens", None), int)
        and hasattr(model, "prune_intermediate_layers")
    )


class TimmTokens(ImageBackbone):
    model: Any  # timm's

    @classmethod
    def takes(cls, request: ImageRequest) -> bool:
        return _fits(timm_model.sketch(request))

    def __init__(self, request: ImageRequest):
        super().__init__()
        created = timm_model.create(request)
        model = self.model = created.model
        if not _fits(model):
            raise request.unfit(
                "it has no plain stack of blocks over patch tokens: choose the backbone 'auto'"
            )
        ratio = getattr(model.patch_embed, "feat_ratio", None)
        if ratio is not None:
            timm_model.check_image_size(request, tuple(ratio(as_scalar=False)))
        depth = self.depth = len(model.blocks)
        last = timm_model.last_block(request, depth, "block")
        norm, pool = model.norm, None
        need = f"{request.model!r} has {last + 1} up to teacher.block: give fewer"
        check(request.average <= last + 1, "teacher.average_blocks", request.average, need)
        # The model's own pooling is trained on the last block's output.
        if last == depth - 1 and request.average == 1:
            pool = getattr(model, "attn_pool", None)
        self.own_pooling = model.global_pool
        timm_model.cut(model, last)
        self.has_class_token = getattr(model, "cls_token", None) is not None
        self.pools = pool is not None and not self.has_class_token
        pooling = None if self.has_class_token else "the mean of patches"
        if self.pools:
            pooling = "its own pooling"
            model.norm, model.attn_pool = norm, pool
        model.forward = model.forward_features
        if request.average > 1:
            model.forward = partial(_mean_of_blocks, model, request.average)
        created.account()
        timm_model.tell(request, model, pooling)
        # Tokens besides patches and class token.
        self.registers = model.num_prefix_tokens - self.has_class_token
        self.prefix = 1 + self.registers
        self.width, self.grid = model.embed_dim, tuple(model.patch_embed.grid_size)
        self.mean, self.std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.blocks)

    def forward(self, pixels: Tensor) -> Tensor:
        # [B, prefix + N, H], or one token fewer if the model has no class token
        x = self.model(pixels)
        if self.has_class_token:
            return x
        if self.pools:
            return torch.cat([self.model.attn_pool(x[:, self.registers :])[:, None], x], 1)
        if self.registers == 0:
            return with_mean(x)
        return torch.cat([x[:, self.registers :].mean(1, keepdim=True), x], 1)


def _mean_of_blocks(model: Any, count: int, pixels: Tensor) -> Tensor:
    """The mean of the last blocks' layer-normalised outputs, as data2vec's (arXiv 2202.03555)."""
    total = torch.zeros((), device=pixels.device)
    for x in model.forward_intermediates(
        pixels, count, True, output_fmt="NLC", intermediates_only=True
    ):
        if isinstance(x, tuple):  # patches, and the tokens before them
            x = torch.cat(x[::-1], 1)
        total = total + F.layer_norm(x.float(), x.shape[-1:])
    return (total / count).to(pixels.dtype)
