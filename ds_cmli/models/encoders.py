"""Encoders: any model of timm or transformers as a class token and patches, or as tokens.

B pairs, S image side in pixels, N patches, M text positions, H width.
"""

import inspect
import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
import transformers
from timm.models import load_state_dict
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    masking_utils,
)

from ds_cmli.errors import nearest

LAYERS = 6  # kept of a plain stack (equal layers, one after the other) if the settings name none
# The names that families of transformers give to dropout after layers, and inside the attention.
DROPOUT = (
    *("hidden_dropout_prob", "dropout", "dropout_rate", "resid_pdrop", "embd_pdrop"),
    *("embedding_dropout", "mlp_dropout"),
)
ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
# Fields that DeBERTa reads although its configuration classes do not declare them.
UNDECLARED = {
    *("attention_head_size", "conv_act", "conv_groups", "conv_kernel_size", "embedding_size"),
    *("norm_rel_ebd", "position_buckets", "share_att_key", "talking_head"),
}
CLASS_BLOCKS = ("cls_attn_blocks", "blocks_token_only")  # of CaiT and XCiT, after the patches'


class PixelNorm(nn.Module):
    """uint8 pixels as the encoder was trained with: zero mean and unit deviation of each colour."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Iterable[float], std: Iterable[float]):
        """`mean` and `std` of each colour, for pixel values from 0 to 1."""
        super().__init__()
        # Integers in units of 1/10000 of a pixel value: a cast to 16 bits would round floats.
        for name, values in (("mean", mean), ("std", std)):
            value = torch.tensor(list(values))[:, None, None] * 255e4
            self.register_buffer(name, value.round().int(), persistent=False)

    def forward(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 [B, 3, S, S] -> `dtype` [B, 3, S, S]."""
        return ((image.float() * 1e4 - self.mean) / self.std).to(dtype)


class ImageEncoder(nn.Module):
    """A timm model up to one block (or stage): normalised pixels [B, 3, S, S] -> [B, 1 + N, H].

    Attributes: `width` (H), `grid` (rows and columns of patches), `mean` and `std` (for
    `PixelNorm`), `blocks`. Where a model has no class token, the mean of patches stands for it.
    """

    model: Any

    def __init__(
        self,
        name: str,
        image_size: int,
        weights: str = "random",
        layers: int | None = None,
        block: int | None = None,
        overrides: Mapping[str, Any] | None = None,
    ):
        """`layers`: how many first blocks are kept, None: `LAYERS`, or all of a model in stages;
        `block`: instead, the last block (or stage) that is kept; `weights`: "hub", "random" or a
        file with all of the model's; `overrides`: arguments of `timm.create_model`."""
        super().__init__()
        # With the weights' own `num_classes` timm loads strictly; the head is cut off below.
        args: dict[str, Any] = {"pretrained": True, **(overrides or {})}
        if weights == "random":
            args |= {"pretrained": False, "num_classes": 0}
        elif weights != "hub":
            os.stat(weights)  # timm's error does not say that there is none
            classes = {key: args[key] for key in ("num_classes",) if key in args}
            args["pretrained_cfg_overlay"] = {"file": weights, **classes}
        try:
            model: Any = timm.create_model(name, img_size=image_size, **args)
        except TypeError as error:
            if "'img_size'" not in str(error) or "multiple" in str(error):
                raise
            model = timm.create_model(name, **args)  # a convolutional model takes any size
        self.model, info = model, [dict(stage) for stage in model.feature_info]
        plain, has = len({(stage["num_chs"], stage["reduction"]) for stage in info}) == 1, len(info)
        if block is not None and not -has <= block < has:
            raise ValueError(f"its blocks are 0 to {has - 1}, and teacher.block is {block}")
        if layers is not None and (not plain or layers > has):
            kind = "blocks" if plain else "stages and no plain stack"
            raise ValueError(f"it has {has} {kind}, and student.layers is {layers}: give null")
        if block is None:
            block = (layers or (min(LAYERS, has) if plain else has)) - 1
        self.last = block % has
        model.prune_intermediate_layers([self.last], prune_norm=True, prune_head=True)
        # The pretrained final norm fits only the last block; student and teacher have their own.
        for unused in ("norm", "fc_norm", "head", "head_dist"):
            if isinstance(getattr(model, unused, None), nn.Module):
                setattr(model, unused, nn.Identity())
        if any(hasattr(model, unused) for unused in CLASS_BLOCKS):
            for unused in ("cls_token", *CLASS_BLOCKS):
                setattr(model, unused, None)
        parameters = inspect.signature(model.forward_intermediates).parameters
        self.has_tokens = "return_prefix_tokens" in parameters  # ViT, DeiT, BEiT, EVA
        self.has_class_token = self.has_tokens and getattr(model, "cls_token", None) is not None
        reduction, self.width = info[self.last]["reduction"], info[self.last]["num_chs"]
        if image_size % reduction:  # timm would crop or pad
            of_a_patch = f"no multiple of the {reduction} pixels of a patch"
            raise ValueError(f"data.image_size is {image_size}: {of_a_patch}")
        self.grid = (image_size // reduction, image_size // reduction)
        if self.has_tokens:
            self.grid = tuple(model.patch_embed.grid_size)
        self.mean, self.std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
        self.stages = [stage["module"] for stage in info[: self.last + 1]]

    @property
    def blocks(self) -> list[nn.Module]:
        """What activation checkpointing recomputes."""
        return blocks_of_stages(self.model, self.stages)

    def forward(self, pixels: Tensor) -> Tensor:
        options: dict[str, Any] = {"indices": [self.last], "norm": False}
        if self.has_tokens:
            options |= {"output_fmt": "NLC", "return_prefix_tokens": True}
        elif pixels.is_cuda:
            # cuDNN's convolutions on tensor cores take channels last, and then give that. The
            # weights, parts of ZeRO's flat buffers, stay as they are: each is copied when used.
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        [x] = self.model.forward_intermediates(pixels, intermediates_only=True, **options)
        patches, prefix = x if isinstance(x, tuple) else (x, None)
        if not self.has_tokens:
            patches = patches.flatten(2).mT  # [B, H, rows, columns] -> [B, N, H]
        first = prefix[:, :1] if self.has_class_token else patches.mean(1, keepdim=True)
        return torch.cat([first, patches], 1)


class TextEncoder(nn.Module):
    """A model of transformers for its last hidden states: int64 and bool [B, M] -> [B, M, H].

    Attributes: `width` (H), `blocks`.
    """

    model: Any
    pooling: str

    def __init__(
        self,
        name: str,
        vocab_size: int,
        positions: int,
        weights: str = "random",
        layers: int | None = None,
        dropout: float = 0.0,
        pad_id: int = 0,
        overrides: Mapping[str, Any] | None = None,
    ):
        """`name`: a family such as "bert", or a name of the hub; `vocab_size`, `pad_id`: the
        tokenizer's; `positions`: M of the longest text; `weights`: "hub", "random", a folder of
        transformers or a file; `layers`: how many first ones are kept, None: `LAYERS`;
        `overrides`: fields of the family's configuration class."""
        super().__init__()
        file = weights if Path(weights).is_file() else None
        if weights not in ("hub", "random") and not Path(weights).exists():
            raise ValueError(f"its weights are {weights!r}: no such file or folder")
        where, fields = name if weights == "hub" else weights, dict(overrides or {})
        published = not (weights == "random" or file)
        if not published:
            where = family(name)
            fields = {"vocab_size": vocab_size, "pad_token_id": pad_id} | fields
        config = text_config(where, layers, dropout, published, **fields)
        kind, options = _model_class(config), {}
        # Otherwise a pooler is made, whose random weights would change those that follow.
        if "add_pooling_layer" in inspect.signature(kind).parameters:
            options["add_pooling_layer"] = False
        if weights == "random":
            # The default dtype is what a user asks for in `from_pretrained` of a whole model.
            self.model = kind._from_config(config, dtype=torch.get_default_dtype(), **options)
        else:
            self.model, keys = kind.from_pretrained(
                None if file else where,
                config=config,
                state_dict=load_state_dict(file) if file else None,
                local_files_only=weights != "hub",
                dtype=torch.float32,
                weights_only=True,
                output_loading_info=True,
                **options,
            )
            if missing := sorted(keys["missing_keys"]):
                raise ValueError(f"{weights!r} lacks {len(missing)} weights, such as {missing[0]}")
            self.model.train()
        most = max_text_length(self.model)
        for module in self.model.modules():
            if isinstance(getattr(module, "head", None), nn.Linear):
                module.head = nn.Identity()  # SigLIP's, after its own pooling
        if config.vocab_size < vocab_size:
            raise ValueError(
                f"it has {config.vocab_size} tokens and data.tokenizer {vocab_size}: choose the "
                "tokenizer that belongs to the model"
            )
        if positions > most:
            raise ValueError(f"data.context_length is {positions}, and it has only {most}")
        self.width = config.hidden_size
        causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        causal = causal and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
        contrastive = config.model_type.endswith("_text_model")  # CLIP's and its like
        self.pooling = "last" if causal or contrastive else "first"
        if "t5" in config.model_type:
            self.pooling = "mean"  # it has no class token

    @property
    def blocks(self) -> list[nn.Module]:
        """What activation checkpointing recomputes."""
        return layers_of(self.model)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, padded: bool | None = None
    ) -> Tensor:
        """`padded`: whether a text of the batch is padded; None: unknown."""
        known = padded is not None and input_ids.is_cuda
        mask = None if known and not padded else attention_mask.long()
        # "Traced", it builds the mask without a look at its values, which is a CPU-GPU sync.
        traced = mock.patch.object(masking_utils, "is_tracing", lambda tensor=None: True)
        with traced if known else nullcontext():
            return self.model(input_ids=input_ids, attention_mask=mask).last_hidden_state

    def pool(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, M, *] -> [B, *]."""
        if self.pooling == "first":
            return tokens[:, 0]
        if self.pooling == "last":
            rows = torch.arange(len(tokens), device=tokens.device)
            return tokens[rows, attention_mask.sum(1) - 1]
        share = attention_mask.to(tokens.dtype) / attention_mask.sum(1, keepdim=True)
        return (share[:, None] @ tokens)[:, 0]  # a matrix product accumulates in fp32


def max_text_length(model: Any) -> float:
    """Return how many tokens a text model of transformers takes; infinity if it has no limit."""
    length = getattr(model.config, "max_position_embeddings", None) or float("inf")
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            length -= padding + 1  # RoBERTa's positions begin after the row of the padding index
    return length


def blocks_of_stages(model: nn.Module, stages: Iterable[str]) -> list[nn.Module]:
    """The blocks of a timm model's stages, by their names in its `feature_info`."""
    blocks: list[nn.Module] = []
    for number, name in enumerate(stages):
        stage = model.get_submodule(name)
        inside, above = getattr(stage, "blocks", stage), name.rpartition(".")[0]
        if isinstance(inside, nn.Sequential | nn.ModuleList):
            blocks += inside
        elif next(stage.parameters(), None) is not None and (above or number > 0):  # not the stem
            blocks.append(stage)
    return blocks


def family(name: str) -> str:
    """The architecture that a model's name begins with: "bert-base-uncased" -> "bert"."""

    own = name.split("/")[-1].lower().replace("_", "-") + "-"
    known = [
        kind for kind in CONFIG_MAPPING if own.startswith(kind.lower().replace("_", "-") + "-")
    ]
    if not known:
        raise ValueError(
            "without a configuration of its own, give an architecture of the transformers library, "
            "such as bert, t5 or clip"
        )
    return max(known, key=len)


def text_config(
    name: str,
    layers: int | None = None,
    dropout: float = 0.0,
    published: bool = False,
    **fields: Any,
) -> PreTrainedConfig:
    """The configuration of a text encoder: of a family, or `published` on the hub or in a folder.

    `layers`, `dropout` and `fields` are as in `TextEncoder`.
    """
    if published:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    else:
        config = AutoConfig.for_model(name)
    config = getattr(config, "text_config", None) or config
    kind, own = type(config), config.to_dict()
    for unknown in sorted(fields.keys() - own.keys() - kind.attribute_map.keys() - UNDECLARED):
        raise ValueError(f"text_overrides has {unknown!r}: {nearest(unknown, own)}")
    # No dropout inside the attention: CPUs have no fused attention kernel with dropout.
    rates = {key: 0.0 for key in ATTENTION_DROPOUT if key in own}
    rates |= {key: dropout for key in DROPOUT if key in own}
    # Built anew, as some classes compute fields from others: not from a family's computed defaults.
    config = kind(**(own if published else {}) | rates | {"use_cache": False} | fields)
    depth = config.num_hidden_layers
    if layers is not None and layers > depth:
        raise ValueError(f"it has {depth} layers, and student.layers is {layers}")
    config.num_hidden_layers = kept = min(LAYERS, depth) if layers is None else layers
    if getattr(config, "layer_types", None):
        config.layer_types = list(config.layer_types[:kept])
    return config


def changed_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields, beside the tokenizer's and dropout, by which `text_config` gives the same."""
    usual, own = type(config)().to_dict(), config.to_dict()
    common = inspect.signature(PreTrainedConfig).parameters.keys() - {"chunk_size_feed_forward"}
    declared = inspect.signature(type(config)).parameters.keys() | UNDECLARED
    names = declared - common - {*DROPOUT, *ATTENTION_DROPOUT, "vocab_size", "use_cache"}
    return {name: own[name] for name in sorted(names & own.keys()) if own[name] != usual.get(name)}


def _model_class(config: PreTrainedConfig) -> Any:
    encoding = MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(config), None)
    kind: Any = encoding or MODEL_MAPPING.get(type(config), None)
    if kind is None:  # SigLIP's text model is in neither table
        kind = getattr(transformers, type(config).__name__.replace("Config", "Model"))
    whole = getattr(config, "is_encoder_decoder", False) and encoding is None
    if whole or kind.main_input_name != "input_ids":
        raise ValueError(f"transformers has no text encoder of {config.model_type!r} alone")
    return kind


def layers_of(model: Any) -> list[nn.Module]:
    """The layers of a text model of transformers."""
    stacks = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    stacks = [stack for stack in stacks if len(stack) == model.config.num_hidden_layers]
    if not stacks:
        return [model.encoder]  # ALBERT's, whose layers share their weights
    largest = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))
    return list(largest)
