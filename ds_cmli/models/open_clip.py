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
from ds_cmli.config.source import ModelSource, library_settings
from ds_cmli.files import JsonObject
from ds_cmli.models import encoders
from ds_cmli.models.dual import PairLossStart, ValuePath, copied, linear, resampled_positions
from ds_cmli.pretrained import loading


class OpenClipImage(nn.Module):
    """The image tower: normalised pixels [B, 3, S, S] -> class token and patches [B, 1 + N, E]."""

    def __init__(self, visual: Any, source_config: JsonObject, image_size: int):
        super().__init__()
        self.model = visual
        self.width = source_config["model_cfg"]["embed_dim"]
        self.mean = source_config["mean"]
        self.std = source_config["std"]
        self.token_head = nn.Sequential(*map(copied, patch_map(visual)))
        self.norm = True
        model = getattr(visual, "trunk", visual)
        if model is not visual:
            stages = [stage["module"] for stage in model.feature_info]
            self.patch = model.feature_info[-1]["reduction"]
        elif hasattr(visual, "layer4"):  # a ResNet
            stages = ["layer1", "layer2", "layer3", "layer4"]
            self.patch = 32
        else:
            stages = ["transformer.resblocks"]
            self.patch, _ = visual.patch_size
            # A norm before the pooling is that of patches too; a CoCa's is as wide as its output.
            self.norm = visual.attn_pool is None and not visual.final_ln_after_pool
        self.blocks = encoders.blocks_of_stages(model, stages)
        self.grid = (image_size // self.patch, image_size // self.patch)

    def forward(self, pixels: Tensor) -> Tensor:
        out = self.model.forward_intermediates(pixels, indices=1, normalize_intermediates=self.norm)
        patches = out["image_intermediates"][0].flatten(2).mT  # [B, H, rows, columns]
        return torch.cat([out["image_features"][:, None], self.token_head(patches)], 1)


class OpenClipText(nn.Module):
    """The text tower: int64 [B, M] -> tokens and then the class token, [B, M + 1, E]."""

    def __init__(self, text: Any, source_config: JsonObject):
        """Raises ValueError if it is of a kind that cannot give tokens, or too short for texts."""
        super().__init__()
        model_cfg = source_config["model_cfg"]
        self.model = text
        self.width = model_cfg["embed_dim"]
        self.vocab_size = text.vocab_size
        self.is_transformers = hasattr(text, "pooler")
        if self.is_transformers:
            projection = text.proj
            self.blocks = encoders.layers_of(text.transformer)
            longest = encoders.max_text_length(text.transformer)
            length = model_cfg["text_cfg"].get("context_length", 0)
            if length > longest:
                raise ValueError(f"data.context_length is {length}, and it has only {longest}")
        elif hasattr(text, "_embeds"):
            projection = text.text_projection
            self.blocks = list(text.transformer.resblocks)
        else:
            raise ValueError(f"its text tower, {type(text).__name__}, gives no features of tokens")
        self.token_head = copied(projection)

    def forward(self, input_ids: Tensor, *_: object) -> Tensor:
        """Encode texts; the ids and the model decide what a token attends to."""
        encode = self._with_transformers if self.is_transformers else self._with_open_clip
        tokens, pooled = encode(input_ids)
        return torch.cat([self.token_head(tokens), pooled[:, None]], 1)

    def _with_transformers(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        model = self.model
        mask = (input_ids != model.config.pad_token_id).long()
        out = model.transformer(input_ids=input_ids, attention_mask=mask)
        return out.last_hidden_state, model.proj(model.pooler(out, mask))

    def _with_open_clip(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        model = self.model
        x, mask = model._embeds(input_ids)
        if mask is not None and mask.ndim == 2:  # the library takes texts of full length alone
            mask = mask[: x.shape[1], : x.shape[1]]
        tokens = model.ln_final(model.transformer(x, attn_mask=mask))
        if model.cls_emb is not None:
            pooled = tokens[:, -1]
            tokens = tokens[:, :-1]
        else:
            pooled = text_global_pool(tokens, input_ids, model.pool_type, model.eos_id)
        projection = model.text_projection  # a layer or a matrix
        return tokens, projection(pooled) if callable(projection) else pooled @ projection

    def pool(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        return tokens[:, -1]


def patch_map(visual: Any) -> list[nn.Module | Tensor | None]:
    """Return the layers that the tower's pooling applies to a patch that it attends to alone.

    As MaskCLIP (Zhou et al., 2022, arXiv 2112.01071).
    """
    if hasattr(visual, "trunk"):
        return timm_patch_map(visual)
    if hasattr(visual, "attnpool"):  # a ResNet's
        return [visual.attnpool.v_proj, visual.attnpool.c_proj]
    layers: list[nn.Module | Tensor | None] = []
    if visual.attn_pool is not None:
        attention = visual.attn_pool.attn
        weight = attention.v_proj_weight
        if weight is None:  # keys and values are as wide as queries
            weight = attention.in_proj_weight
        width = attention.embed_dim
        value = linear(weight[-width:], attention.in_proj_bias[-width:])
        layers = [visual.attn_pool.ln_k, value, attention.out_proj]
    if layers or visual.final_ln_after_pool:
        layers.append(visual.ln_post)
    return [*layers, visual.proj]


def timm_patch_map(visual: Any) -> list[nn.Module | Tensor | None]:
    """Return the same of a tower of timm."""
    pool = getattr(visual.trunk, "attn_pool", None)
    head = getattr(visual.trunk, "head", None)  # with `timm_proj` null it is the projection
    layers = [getattr(visual.trunk, "fc_norm", None), getattr(head, "norm", None)]
    layers += [getattr(head, "fc", head), visual.head]
    if pool is not None:
        _, weight = pool.kv.weight.chunk(2)
        _, bias = pool.kv.bias.chunk(2)
        layers.insert(0, ValuePath(linear(weight, bias), pool.proj, pool.norm, pool.mlp))
    return [part for part in layers if isinstance(part, nn.Module) and [*part.parameters()]]


def build_towers(
    config: StudentConfig, image_size: int, pretrained: bool
) -> tuple[OpenClipImage, OpenClipText, PairLossStart | None]:
    """Build both towers of the source, as `dual.build_towers`."""
    source_config = config.source_config
    source = ModelSource(config.source)
    loaded: Any = None
    ask_hub = pretrained and not source.is_local
    with loading(ask_hub, name=source.name), source.blame("open_clip cannot load it"):
        model = random_model(source_config, image_size)
        if pretrained and config.source:
            source_data = library_settings(source, {})["data"]
            # By these the library resamples its positions.
            options = {"force_context_length": model.context_length}
            if image_size != source_data["image_size"]:
                options["force_image_size"] = image_size
            name, weights = source.in_open_clip
            loaded = open_clip.create_model(
                name, weights, force_custom_text=True, require_pretrained=True, **options
            )
            model.visual.load_state_dict(loaded.visual.state_dict())
            model.text.load_state_dict(loaded.text.state_dict())
        image = OpenClipImage(model.visual, source_config, image_size)
        text = OpenClipText(model.text, source_config)
    if loaded is None:
        return image, text, None
    # The table of a model of transformers has more positions than texts have tokens.
    length = source_data["context_length"] if text.is_transformers else model.context_length
    resampled = resampled_positions(source, image_size, length, image.patch, "linear")
    return image, text, PairLossStart.of(loaded, resampled)


def random_model(source_config: JsonObject, image_size: int) -> Any:
    model_cfg = {**source_config["model_cfg"]}
    model_cfg.pop("custom_text", None)
    with TemporaryDirectory() as folder:
        if "text_config" in source_config:  # open_clip reads it by a name
            no_dropout = dict.fromkeys((*encoders.DROPOUT, *encoders.ATTENTION_DROPOUT), 0.0)
            fields = source_config["text_config"] | no_dropout
            Path(folder, "config.json").write_text(json.dumps(fields))
            model_cfg["text_cfg"] = model_cfg["text_cfg"] | {"hf_model_name": folder}
        model: Any = open_clip.CustomTextCLIP(**model_cfg)
    if hasattr(model.visual, "trunk"):
        _, _, usual = model.visual.trunk.pretrained_cfg["input_size"]
        if image_size != usual:  # the library builds timm's models at their usual size
            model.visual.set_input_size(image_size)
    return model
