"""The two towers of a model of the open_clip package, its own modules, as encoders of a student.

Class features are the library's own. Patches and tokens begin in the same space: through copies of
what the library applies to its pooled features.

Shapes: B pairs, S image side in pixels, N image patches, M text positions, H width of a tower, E
width of the joint space.
"""

import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ds_cmli.common.json_text import JsonObject
from ds_cmli.config.open_clip import HUB, LOCAL, NAMED, OF_TRAINING, Named, is_marked
from ds_cmli.config.schema import StudentConfig
from ds_cmli.models.dual import Start, copied, layer
from ds_cmli.models.encoders import ATTENTION_DROPOUT, DROPOUT, blocks_of_stages, layers_of
from ds_cmli.models.weights import building


class OpenClipImage(nn.Module):
    """The image tower: normalised pixels [B, 3, S, S] -> class token and patches [B, 1 + N, E]."""

    def __init__(self, visual: Any, own: JsonObject, image_size: int):
        """`own`: `StudentConfig.source_config`; `image_size`: S."""
        super().__init__()
        self.model, self.width = visual, own["model_cfg"]["embed_dim"]
        self.mean, self.std = own["mean"], own["std"]
        # A norm before the pooling is that of patches too; a CoCa's is as wide as its output.
        pooled_norm = getattr(visual, "final_ln_after_pool", False)
        self.normed = getattr(visual, "attn_pool", None) is None and not pooled_norm
        self.token_head = patch_map(visual)
        patch = getattr(visual, "patch_size", (32, 32))[0]
        if hasattr(visual, "trunk"):
            patch = visual.trunk.feature_info[-1]["reduction"]
        self.grid = (image_size // patch, image_size // patch)

    @property
    def blocks(self) -> list[nn.Module]:
        if hasattr(self.model, "trunk"):
            trunk = self.model.trunk
            return blocks_of_stages(trunk, [stage["module"] for stage in trunk.feature_info])
        if hasattr(self.model, "layer4"):
            return [block for i in range(1, 5) for block in getattr(self.model, f"layer{i}")]
        return list(self.model.transformer.resblocks)

    def forward(self, pixels: Tensor) -> Tensor:
        out = self.model.forward_intermediates(
            pixels, indices=1, normalize_intermediates=self.normed
        )
        patches = out["image_intermediates"][0].flatten(2).mT  # [B, H, rows, columns]
        return torch.cat([out["image_features"][:, None], self.token_head(patches)], 1)

    def joint(self, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        return cls, patches


class OpenClipText(nn.Module):
    """The text tower: int64 [B, M] -> tokens and then the class token, [B, M + 1, E]."""

    def __init__(self, text: Any, own: JsonObject):
        super().__init__()
        self.model, self.width = text, own["model_cfg"]["embed_dim"]
        self.of_transformers = hasattr(text, "pooler")
        self.token_head = copied(text.proj if self.of_transformers else text.text_projection)

    @property
    def blocks(self) -> list[nn.Module]:
        if self.of_transformers:
            return layers_of(self.model.transformer)
        return list(self.model.transformer.resblocks)

    def forward(self, input_ids: Tensor, *_: object) -> Tensor:
        """What a token attends to, the ids and the model say."""
        model = self.model
        if self.of_transformers:
            mask = (input_ids != model.config.pad_token_id).long()
            out = model.transformer(input_ids=input_ids, attention_mask=mask)
            pooled, tokens = model.proj(model.pooler(out, mask)), out.last_hidden_state
        else:
            pooled, tokens = _of_text(model, input_ids)
        return torch.cat([self.token_head(tokens), pooled[:, None]], 1)

    def pool(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        return tokens[:, -1]

    def joint(self, cls: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return cls, tokens[:, :-1]


def _of_text(model: Any, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """As `TextTransformer.forward`, whose causal mask is that of the longest texts alone."""
    from open_clip.transformer import text_global_pool

    x, mask = model._embeds(input_ids)
    if mask is not None and mask.ndim == 2:
        mask = mask[: x.shape[1], : x.shape[1]]
    x = model.ln_final(model.transformer(x, attn_mask=mask))
    if model.cls_emb is not None:
        pooled, x = x[:, -1], x[:, :-1]
    else:
        pooled = text_global_pool(x, input_ids, model.pool_type, model.eos_id)
    projection = model.text_projection
    if isinstance(projection, nn.Linear):
        return projection(pooled), x
    return pooled if projection is None else pooled @ projection, x


class Residual(nn.Module):
    def __init__(self, norm: nn.Module, mlp: nn.Module):
        super().__init__()
        self.norm, self.mlp = norm, mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def patch_map(visual: Any) -> nn.Module:
    """What the tower's pooling gives where it attends to one patch alone (MaskCLIP, 2112.01071)."""
    if hasattr(visual, "attnpool"):  # ResNet
        return nn.Sequential(copied(visual.attnpool.v_proj), copied(visual.attnpool.c_proj))
    parts: list[Any] = []
    if not hasattr(visual, "trunk"):
        if (pool := visual.attn_pool) is not None:
            values = pool.attn.v_proj_weight
            if values is None:
                values = pool.attn.in_proj_weight.chunk(3)[2]
            value = layer(values, pool.attn.in_proj_bias.chunk(3)[2])
            parts += [pool.ln_k, value, pool.attn.out_proj]
        if pool is not None or visual.final_ln_after_pool:
            parts.append(visual.ln_post)
        return nn.Sequential(*map(copied, parts), copied(visual.proj))
    trunk, own = visual.trunk, dict(visual.head.named_children())
    if (pool := getattr(trunk, "attn_pool", None)) is not None:
        if not isinstance(pool, AttentionPoolLatent) or pool.pos_embed is not None:
            raise ValueError(f"its pooling is {type(pool).__name__}, which is not supported")
        bias = None if pool.kv.bias is None else pool.kv.bias.chunk(2)[1]
        parts += [layer(pool.kv.weight.chunk(2)[1], bias), pool.proj]
        if pool.mlp is not None:
            parts.append(Residual(pool.norm, pool.mlp))
    if "pool" in own:
        raise ValueError(f"its timm_pool is {type(own['pool']).__name__}, which is not supported")
    head = getattr(trunk, "head", None)  # with `timm_proj` null it is the projection
    parts += [getattr(trunk, "fc_norm", None), getattr(head, "norm", None)]
    parts += [getattr(head, "pre_logits", None), getattr(head, "fc", head), visual.head]
    parts = [part for part in parts if isinstance(part, nn.Module) and [*part.parameters()]]
    return nn.Sequential(*map(copied, parts))


def of_towers(own: JsonObject) -> JsonObject:
    """The part of `model_cfg` of `StudentConfig.source_config` that two towers have."""
    model = deepcopy(own["model_cfg"])
    if model.pop("multimodal_cfg", None) is not None:
        for side in ("vision_cfg", "text_cfg"):
            model[side].pop("output_tokens", None)
        model["custom_text"] = True
    return model


def transformers_config(own: JsonObject) -> PreTrainedConfig:
    """The configuration of a text encoder of transformers, without dropout."""
    fields = deepcopy(own["text_config"]) | {"use_cache": False}
    config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    for name in (*DROPOUT, *ATTENTION_DROPOUT):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config


def build(
    config: StudentConfig, image_size: int, pretrained: bool
) -> tuple[OpenClipImage, OpenClipText, Start | None]:
    """As `dual.build`."""
    import open_clip

    own, start, what = config.source_config, None, f"student.source is {config.source!r}"
    with building(f"{what}: open_clip cannot build it"):
        cfg = of_towers(own)
        cfg.pop("custom_text", None)
        cfg["vision_cfg"] |= {name: 0.0 for name in OF_TRAINING if cfg["vision_cfg"].get(name)}
        cfg["vision_cfg"]["timm_model_pretrained"] = False
        with tempfile.TemporaryDirectory() as folder:
            if "text_config" in own:  # open_clip reads it by a name
                transformers_config(own).save_pretrained(folder)
                cfg["text_cfg"] |= {"hf_model_name": folder, "hf_model_pretrained": False}
            model: Any = open_clip.CustomTextCLIP(**cfg)
    if pretrained and config.source:
        name, weights = config.source, None
        if name.startswith(NAMED):
            named = Named.of(name)
            file = named.file.is_file()
            name, weights = named.architecture, str(named.file) if file else named.weights
        elif not is_marked(name):
            name = f"{LOCAL if Path(name).expanduser().is_dir() else HUB}{name}"
        hub = name.startswith(HUB) or bool(weights and not file)
        with building(f"{what}: its weights cannot be loaded", "hub" if hub else "random"):
            theirs: Any = open_clip.create_model(
                name, weights, force_custom_text=True, require_pretrained=True
            )
        for part in ("visual", "text"):
            getattr(model, part).load_state_dict(getattr(theirs, part).state_dict())
        bias = theirs.logit_bias
        start = Start(theirs.logit_scale.item(), None if bias is None else bias.item())
    with building(what):
        return OpenClipImage(model.visual, own, image_size), OpenClipText(model.text, own), start


def vocab_size(config: StudentConfig) -> int:
    """The number of rows of the source's table of tokens."""
    own = config.source_config
    if "text_config" in own:
        return transformers_config(own).vocab_size
    return own["model_cfg"]["text_cfg"].get("vocab_size", 49408)


def width(config: StudentConfig) -> int:
    """The width of the joint space."""
    return config.embed_dim
