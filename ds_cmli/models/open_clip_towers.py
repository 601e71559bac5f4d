"""The towers of an open_clip model as encoders that end in its joint space.

All modules are the library's own, under their names. open_clip's class features are the class
tokens, and patches and tokens pass maps of their own (`open_clip_heads.py`).

Shapes: B pairs, S image side in pixels, N image patches, M text positions, H width of a tower, E
width of the joint space.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer, text_global_pool
from torch import Tensor, nn

from ds_cmli.models import open_clip_heads as heads
from ds_cmli.models.backbone import ImageBackbone, TextBackbone
from ds_cmli.models.timm_grid import blocks_of_stages
from ds_cmli.models.transformers_text import blocks_of


def _outside(tower: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """What the pooling of a ResNet reads of other modules."""
    for module in tower.modules():
        if isinstance(module, AttentionPool2d):
            for layer in module.children():
                for parameter in layer.parameters():
                    yield module, parameter


def _of_vit(visual: VisionTransformer, pixels: Tensor) -> tuple[Tensor, Tensor]:
    x = visual.transformer(visual._embeds(pixels))
    pooled, patches = visual._pool(x)
    if visual.attn_pool is not None:  # it gives tokens of its own, and not of patches
        patches = x[:, 1:]
    return pooled, patches


def _of_resnet(visual: ModifiedResNet, pixels: Tensor) -> tuple[Tensor, Tensor]:
    x = visual.stem(pixels)
    for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        x = layer(x)
    return visual.attnpool(x), x.flatten(2).transpose(1, 2)


def _of_trunk(visual: TimmModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    trunk = visual.trunk
    x = trunk.forward_features(pixels)
    pooled = trunk.forward_head(x)
    if x.ndim == 3:
        return pooled, x[:, trunk.num_prefix_tokens :]
    if getattr(trunk, "output_fmt", "NCHW") == "NHWC":
        return pooled, x.flatten(1, 2)
    return pooled, x.flatten(2).transpose(1, 2)


def _of_timm(visual: TimmModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    pooled, patches = visual.trunk(pixels)
    return visual.head(pooled), patches


class OpenClipImage(ImageBackbone):
    """The image tower, whose patches and class token are E wide."""

    model: Any

    def __init__(self, visual: nn.Module, width: int, mean: list[float], std: list[float]):
        """`visual`: of a model of open_clip. Raises `open_clip_heads.NoHead`."""
        super().__init__()
        model: Any = visual
        self.model, self.width, self.prefix = model, width, 1
        self.mean, self.std = mean, std
        self.class_head: nn.Module = nn.Identity()
        if isinstance(model, TimmModel):
            model.trunk.forward = partial(_of_trunk, model)
            model.forward = partial(_of_timm, model)
            self.token_head = heads.of_timm(model)
            reduction = model.trunk.feature_info[-1]["reduction"]
            self.grid = (model.image_size[0] // reduction, model.image_size[1] // reduction)
        elif isinstance(model, ModifiedResNet):
            model.forward = partial(_of_resnet, model)
            self.token_head = heads.of_resnet(model)
            self.grid = (model.image_size // 32, model.image_size // 32)
        else:
            heads.with_linear_layers(model)
            model.forward = partial(_of_vit, model)
            # After the blocks, as a module is above the layers that it is registered after.
            self.class_head, model.proj = heads.linear(model.proj), None
            self.token_head = heads.of_vit(model, self.class_head)
            self.grid = tuple(model.grid_size)
        self.depth = len(self.blocks)

    @property
    def blocks(self) -> list[nn.Module]:
        if isinstance(self.model, ModifiedResNet):
            stages = (self.model.layer1, self.model.layer2, self.model.layer3, self.model.layer4)
            return [block for stage in stages for block in stage]
        if not isinstance(self.model, TimmModel):
            return list(self.model.transformer.resblocks)
        trunk = self.model.trunk
        if isinstance(getattr(trunk, "blocks", None), nn.Sequential | nn.ModuleList):
            return list(trunk.blocks)
        return blocks_of_stages(trunk, [stage["module"] for stage in trunk.feature_info])

    def read_outside(self) -> Iterator[tuple[nn.Module, nn.Parameter]]:
        return _outside(self.model)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, 1 + N, E]."""
        pooled, patches = self.model(pixels)
        return torch.cat([self.class_head(pooled)[:, None], self.token_head(patches)], 1)


def _of_text(text: TextTransformer, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    x, mask = text._embeds(input_ids)
    if mask is not None and mask.ndim == 2:  # of the longest texts
        mask = mask[: x.shape[1], : x.shape[1]]
    x = text.ln_final(text.transformer(x, attn_mask=mask))
    if text.cls_emb is not None:
        return x[:, -1], x[:, :-1]
    return text_global_pool(x, input_ids, text.pool_type, text.eos_id), x


def _of_transformers(text: HFTextEncoder, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    mask = (input_ids != text.config.pad_token_id).long()
    out = text.transformer(input_ids=input_ids, attention_mask=mask)
    return text.proj(text.pooler(out, mask)), out.last_hidden_state


class OpenClipText(TextBackbone):
    """The text tower, whose tokens and class token, after them, are E wide."""

    model: Any
    suffix = 1

    def __init__(self, text: nn.Module, width: int):
        """`text`: of a model of open_clip."""
        super().__init__()
        model: Any = text
        self.model, self.width = model, width
        self.most_positions = model.context_length or None
        self.class_head: nn.Module = nn.Identity()
        if isinstance(model, HFTextEncoder):
            model.forward = partial(_of_transformers, model)
            self.token_head = heads.copied(model.proj)
        else:
            heads.with_linear_layers(model)
            model.forward = partial(_of_text, model)
            self.class_head, model.text_projection = heads.linear(model.text_projection), None
            self.token_head = heads.copied(self.class_head)
        self.depth = len(self.blocks)

    @property
    def blocks(self) -> list[nn.Module]:
        if isinstance(self.model, HFTextEncoder):
            return blocks_of(self.model.transformer)
        return list(self.model.transformer.resblocks)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """int64 [B, M] -> [B, M + 1, E]; what a token attends to, the ids and the model say."""
        pooled, tokens = self.model(input_ids)
        return torch.cat([self.token_head(tokens), self.class_head(pooled)[:, None]], 1)

    def pool(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        return tokens[:, -1]

    def joint(self, cls: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return cls, tokens[:, : -self.suffix]
