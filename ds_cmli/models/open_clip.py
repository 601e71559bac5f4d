"""The two towers of a model of the open_clip package, its own modules, as encoders of a student.

Class features are the library's own. Patches and tokens begin in the same space: through copies of
what the library applies to its pooled features.

Shapes: B pairs, S image side in pixels, N image patches, M text positions, E width of the joint
space.
"""

from collections import OrderedDict
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import open_clip
import torch
from open_clip.transformer import text_global_pool
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from ds_cmli.common import JsonObject, blame
from ds_cmli.config.schema import StudentConfig
from ds_cmli.config.source import HUB, LOCAL, NAMED, architecture_and_weights, is_marked
from ds_cmli.models.dual import Start, copied, layer
from ds_cmli.models.encoders import ATTENTION_DROPOUT, DROPOUT, blocks_of_stages, layers_of
from ds_cmli.pretrained import loading

# What of a model of open_clip acts in training alone.
OF_TRAINING = ("patch_dropout", "timm_drop", "timm_drop_path")


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
        self.token_head = nn.Sequential(*map(copied, patch_map(visual)))
        patch = getattr(visual, "patch_size", (32, 32))[0]
        if hasattr(visual, "trunk"):
            patch = visual.trunk.feature_info[-1]["reduction"]
        self.grid = (image_size // patch, image_size // patch)

    @property
    def blocks(self) -> list[nn.Module]:
        model = self.model
        if hasattr(model, "trunk"):
            stages = [stage["module"] for stage in model.trunk.feature_info]
            return blocks_of_stages(model.trunk, stages)
        if hasattr(model, "layer4"):
            return [*model.layer1, *model.layer2, *model.layer3, *model.layer4]
        return list(model.transformer.resblocks)

    def forward(self, pixels: Tensor) -> Tensor:
        norm = {"normalize_intermediates": self.normed}
        out = self.model.forward_intermediates(pixels, indices=1, **norm)
        patches = out["image_intermediates"][0].flatten(2).mT  # [B, H, rows, columns]
        return torch.cat([out["image_features"][:, None], self.token_head(patches)], 1)


class OpenClipText(nn.Module):
    """The text tower: int64 [B, M] -> tokens and then the class token, [B, M + 1, E]."""

    def __init__(self, text: Any, own: JsonObject):
        super().__init__()
        self.model, self.width = text, own["model_cfg"]["embed_dim"]
        self.of_transformers = hasattr(text, "pooler")
        self.token_head = copied(text.proj if self.of_transformers else text.text_projection)
        self.vocab_size: int = text.vocab_size

    @property
    def blocks(self) -> list[nn.Module]:
        model = self.model.transformer
        return layers_of(model) if self.of_transformers else list(model.resblocks)

    def forward(self, input_ids: Tensor, *_: object) -> Tensor:
        """What a token attends to, the ids and the model say."""
        model = self.model
        if self.of_transformers:
            mask = (input_ids != model.config.pad_token_id).long()
            out = model.transformer(input_ids=input_ids, attention_mask=mask)
            pooled, tokens = model.proj(model.pooler(out, mask)), out.last_hidden_state
        else:
            # The library's own `forward` takes texts of the greatest length alone.
            x, mask = model._embeds(input_ids)
            if mask is not None and mask.ndim == 2:
                mask = mask[: x.shape[1], : x.shape[1]]
            tokens = model.ln_final(model.transformer(x, attn_mask=mask))
            if model.cls_emb is not None:
                pooled, tokens = tokens[:, -1], tokens[:, :-1]
            else:
                pooled = text_global_pool(tokens, input_ids, model.pool_type, model.eos_id)
            if isinstance(projection := model.text_projection, nn.Linear):
                pooled = projection(pooled)
            elif projection is not None:
                pooled = pooled @ projection
        return torch.cat([self.token_head(tokens), pooled[:, None]], 1)

    def pool(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        return tokens[:, -1]


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def patch_map(visual: Any) -> list[nn.Module | Tensor | None]:
    """What the tower's pooling does to a patch that it attends to alone (MaskCLIP, 2112.01071)."""
    if hasattr(visual, "attnpool"):  # ResNet
        return [visual.attnpool.v_proj, visual.attnpool.c_proj]
    trunk = getattr(visual, "trunk", visual)
    pool, parts = getattr(trunk, "attn_pool", None), []
    if trunk is visual:
        if pool is not None:
            values = pool.attn.v_proj_weight  # None: as wide as the queries
            if values is None:
                values = pool.attn.in_proj_weight.chunk(3)[2]
            value = layer(values, pool.attn.in_proj_bias.chunk(3)[2])
            parts += [pool.ln_k, value, pool.attn.out_proj]
        if pool is not None or visual.final_ln_after_pool:
            parts.append(visual.ln_post)
        return [*parts, visual.proj]
    known = pool is None or (isinstance(pool, AttentionPoolLatent) and pool.pos_embed is None)
    if not known or hasattr(visual.head, "pool"):
        kind = type(visual.head.pool if known else pool).__name__
        raise ValueError(f"its pooling is {kind}, which is not supported")
    if pool is not None:
        bias = None if pool.kv.bias is None else pool.kv.bias.chunk(2)[1]
        parts += [layer(pool.kv.weight.chunk(2)[1], bias), pool.proj]
        if pool.mlp is not None:
            parts.append(Residual(OrderedDict(norm=pool.norm, mlp=pool.mlp)))
    head = getattr(trunk, "head", None)  # with `timm_proj` null it is the projection
    parts += [getattr(trunk, "fc_norm", None), getattr(head, "norm", None)]
    parts += [getattr(head, "pre_logits", None), getattr(head, "fc", head), visual.head]
    return [part for part in parts if isinstance(part, nn.Module) and [*part.parameters()]]


def of_towers(own: JsonObject) -> JsonObject:
    """The part of `model_cfg` of `StudentConfig.source_config` that two towers have."""
    model = deepcopy(own["model_cfg"])
    if model.pop("multimodal_cfg", None) is not None:
        for side in ("vision_cfg", "text_cfg"):
            model[side].pop("output_tokens", None)
        model["custom_text"] = True
    return model


def build(
    config: StudentConfig, image_size: int, pretrained: bool
) -> tuple[OpenClipImage, OpenClipText, Start | None]:
    """As `dual.build`."""
    own, start, what = config.source_config, None, f"student.source is {config.source!r}"
    how = f"{what}: open_clip cannot build it"
    with loading(hub=False), blame(how), TemporaryDirectory() as folder:
        cfg = of_towers(own)
        cfg.pop("custom_text", None)
        cfg["vision_cfg"] |= {name: 0.0 for name in OF_TRAINING if cfg["vision_cfg"].get(name)}
        cfg["vision_cfg"]["timm_model_pretrained"] = False
        if "text_config" in own:  # open_clip reads it by a name
            fields = deepcopy(own["text_config"]) | {"use_cache": False}
            text = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
            for name in {*DROPOUT, *ATTENTION_DROPOUT} & vars(text).keys():
                setattr(text, name, 0.0)
            text.save_pretrained(folder)
            cfg["text_cfg"] |= {"hf_model_name": folder, "hf_model_pretrained": False}
        model: Any = open_clip.CustomTextCLIP(**cfg)
    if pretrained and config.source:
        name, weights = library_name(config.source)
        hub = name.startswith(HUB) or not (weights is None or Path(weights).is_file())
        with loading(hub), blame(f"{what}: its weights cannot be loaded"):
            theirs: Any = open_clip.create_model(
                name, weights, force_custom_text=True, require_pretrained=True
            )
        for part in ("visual", "text"):
            getattr(model, part).load_state_dict(getattr(theirs, part).state_dict())
        start = Start.of(theirs)
    with blame(what):
        return OpenClipImage(model.visual, own, image_size), OpenClipText(model.text, own), start


def library_name(source: str) -> tuple[str, str | None]:
    """What `open_clip.create_model` calls `student.source`: its name and that of its weights."""
    if source.startswith(NAMED):
        return architecture_and_weights(source)
    if is_marked(source):
        return source, None
    return f"{LOCAL if Path(source).expanduser().is_dir() else HUB}{source}", None
