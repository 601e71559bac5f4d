"""The two towers of a model of the open_clip package, its own modules, as encoders of a student.

Class features are the library's own; patches and tokens pass copies of what it applies to those.
B pairs, S image side in pixels, N patches, M text positions, E width of the joint space.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import open_clip
import torch
from open_clip.transformer import text_global_pool
from torch import Tensor, nn

from ds_cmli.config.schema import StudentConfig
from ds_cmli.config.source import Source
from ds_cmli.files import JsonObject
from ds_cmli.models.dual import Start, ValuePath, copied, layer
from ds_cmli.models.encoders import ATTENTION_DROPOUT, DROPOUT, blocks_of_stages, layers_of
from ds_cmli.pretrained import loading


class OpenClipImage(nn.Module):
    """The image tower: normalised pixels [B, 3, S, S] -> class token and patches [B, 1 + N, E]."""

    def __init__(self, visual: Any, own: JsonObject, image_size: int):
        super().__init__()
        self.model, self.width = visual, own["model_cfg"]["embed_dim"]
        self.mean, self.std = own["mean"], own["std"]
        self.token_head = nn.Sequential(*map(copied, patch_map(visual)))
        model, self.norm = getattr(visual, "trunk", visual), True
        if model is not visual:
            stages = [stage["module"] for stage in model.feature_info]
            patch = model.feature_info[-1]["reduction"]
        elif hasattr(visual, "layer4"):  # a ResNet
            stages, patch = ["layer1", "layer2", "layer3", "layer4"], 32
        else:
            stages, patch = ["transformer.resblocks"], visual.patch_size[0]
            # A norm before the pooling is that of patches too; a CoCa's is as wide as its output.
            self.norm = visual.attn_pool is None and not visual.final_ln_after_pool
        self.blocks = blocks_of_stages(model, stages)
        self.grid = (image_size // patch, image_size // patch)

    def forward(self, pixels: Tensor) -> Tensor:
        out = self.model.forward_intermediates(pixels, indices=1, normalize_intermediates=self.norm)
        patches = out["image_intermediates"][0].flatten(2).mT  # [B, H, rows, columns]
        return torch.cat([out["image_features"][:, None], self.token_head(patches)], 1)


class OpenClipText(nn.Module):
    """The text tower: int64 [B, M] -> tokens and then the class token, [B, M + 1, E]."""

    def __init__(self, text: Any, own: JsonObject):
        super().__init__()
        self.model, self.width = text, own["model_cfg"]["embed_dim"]
        self.vocab_size, self.of_transformers = text.vocab_size, hasattr(text, "pooler")
        self.token_head = copied(text.proj if self.of_transformers else text.text_projection)
        stack = text.transformer
        self.blocks = layers_of(stack) if self.of_transformers else list(stack.resblocks)

    def forward(self, input_ids: Tensor, *_: object) -> Tensor:
        """What a token attends to, the ids and the model say."""
        model = self.model
        if self.of_transformers:
            mask = (input_ids != model.config.pad_token_id).long()
            out = model.transformer(input_ids=input_ids, attention_mask=mask)
            pooled, tokens = model.proj(model.pooler(out, mask)), out.last_hidden_state
        else:
            x, mask = model._embeds(input_ids)
            if mask is not None and mask.ndim == 2:  # the library takes texts of full length alone
                mask = mask[: x.shape[1], : x.shape[1]]
            tokens = model.ln_final(model.transformer(x, attn_mask=mask))
            if model.cls_emb is not None:
                pooled, tokens = tokens[:, -1], tokens[:, :-1]
            else:
                pooled = text_global_pool(tokens, input_ids, model.pool_type, model.eos_id)
            projection = model.text_projection  # a layer or a matrix
            pooled = projection(pooled) if callable(projection) else pooled @ projection
        return torch.cat([self.token_head(tokens), pooled[:, None]], 1)

    def pool(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        return tokens[:, -1]


def patch_map(visual: Any) -> list[nn.Module | Tensor | None]:
    """What the tower's pooling does to a patch that it attends to alone (MaskCLIP, 2112.01071)."""
    if hasattr(visual, "attnpool"):  # a ResNet's
        return [visual.attnpool.v_proj, visual.attnpool.c_proj]
    trunk = getattr(visual, "trunk", visual)
    pool, parts = getattr(trunk, "attn_pool", None), []
    if trunk is visual:
        if pool is not None:
            own = pool.attn
            weight = own.in_proj_weight if own.v_proj_weight is None else own.v_proj_weight
            value = layer(weight[-own.embed_dim :], own.in_proj_bias[-own.embed_dim :])
            parts = [pool.ln_k, value, own.out_proj]
        if pool is not None or visual.final_ln_after_pool:
            parts.append(visual.ln_post)
        return [*parts, visual.proj]
    if pool is not None:
        value = layer(pool.kv.weight.chunk(2)[1], pool.kv.bias.chunk(2)[1])
        parts = [ValuePath(value, pool.proj, pool.norm, pool.mlp)]
    head = getattr(trunk, "head", None)  # with `timm_proj` null it is the projection
    parts += [getattr(trunk, "fc_norm", None), getattr(head, "norm", None)]
    parts += [getattr(head, "fc", head), visual.head]
    return [part for part in parts if isinstance(part, nn.Module) and [*part.parameters()]]


def build(
    config: StudentConfig, image_size: int, pretrained: bool
) -> tuple[OpenClipImage, OpenClipText, Start | None]:
    """As `dual.build`."""
    own, source, start = config.source_config, Source(config.source), None
    hub = pretrained and not source.local
    with loading(hub), source.blame("open_clip cannot load it"), TemporaryDirectory() as folder:
        cfg = {name: value for name, value in own["model_cfg"].items() if name != "custom_text"}
        if "text_config" in own:  # open_clip reads it by a name
            fields = own["text_config"] | dict.fromkeys((*DROPOUT, *ATTENTION_DROPOUT), 0.0)
            Path(folder, "config.json").write_text(json.dumps(fields))
            cfg["text_cfg"] = cfg["text_cfg"] | {"hf_model_name": folder}
        model: Any = open_clip.CustomTextCLIP(**cfg)
        if pretrained and config.source:
            how = {"force_custom_text": True, "require_pretrained": True}
            theirs: Any = open_clip.create_model(*source.in_open_clip, **how)
            model.visual.load_state_dict(theirs.visual.state_dict())
            model.text.load_state_dict(theirs.text.state_dict())
            start = Start.of(theirs)
        return OpenClipImage(model.visual, own, image_size), OpenClipText(model.text, own), start
