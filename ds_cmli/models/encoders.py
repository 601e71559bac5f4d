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
from transformers import PreTrainedConfig, masking_utils

from ds_cmli.config.messages import words
from ds_cmli.errors import nearest

LAYERS = 6  # kept of a plain stack (equal layers, one after the other) if the settings name none
# The names that families of transformers give to dropout after layers, and inside the attention.
DROPOUT = words("""
    hidden_dropout_prob dropout dropout_rate resid_pdrop embd_pdrop embedding_dropout mlp_dropout
""")
ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
# Fields that DeBERTa reads although its configuration classes do not declare them.
UNDECLARED = words("""
    attention_head_size conv_act conv_groups conv_kernel_size embedding_size norm_rel_ebd
    position_buckets share_att_key talking_head
""")
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
    `PixelNorm`), `blocks`. If a model has no class token, the mean of patches stands for it.
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
        """Build the model, and cut it. Raises timm's errors, and ValueError.

        `layers`: the number of first blocks to keep, None: `LAYERS`, or all of a model in stages;
        `block`: instead, the last block (or stage) to keep; `weights`: "hub", "random" or a file
        with all of the model's; `overrides`: arguments of `timm.create_model`.
        """
        super().__init__()
        self.model = create_timm_model(name, image_size, weights, overrides or {})
        stages = [dict(stage) for stage in self.model.feature_info]
        self.last = last_block(stages, layers, block)
        cut_timm_model(self.model, self.last)
        parameters = inspect.signature(self.model.forward_intermediates).parameters
        self.has_tokens = "return_prefix_tokens" in parameters  # ViT, DeiT, BEiT, EVA
        class_token = getattr(self.model, "cls_token", None)
        self.has_class_token = self.has_tokens and class_token is not None
        self.width = stages[self.last]["num_chs"]
        patch = stages[self.last]["reduction"]
        if image_size % patch:  # timm would crop or pad
            multiple = f"no multiple of the {patch} pixels of a patch"
            raise ValueError(f"data.image_size is {image_size}: {multiple}")
        self.grid = (image_size // patch, image_size // patch)
        self.mean = self.model.pretrained_cfg["mean"]
        self.std = self.model.pretrained_cfg["std"]
        kept_stages = [stage["module"] for stage in stages[: self.last + 1]]
        self.blocks = blocks_of_stages(self.model, kept_stages)

    def forward(self, pixels: Tensor) -> Tensor:
        options: dict[str, Any] = {"indices": [self.last], "norm": False}
        if self.has_tokens:
            options |= {"output_fmt": "NLC", "return_prefix_tokens": True}
        elif pixels.is_cuda:
            # cuDNN's convolutions on tensor cores take and give channels last. The weights stay as
            # they are, because they are parts of ZeRO's flat buffers: each is copied when used.
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        [x] = self.model.forward_intermediates(pixels, intermediates_only=True, **options)
        patches, prefix = x if isinstance(x, tuple) else (x, None)
        if not self.has_tokens:
            patches = patches.flatten(2).mT  # [B, H, rows, columns] -> [B, N, H]
        first = prefix[:, :1] if self.has_class_token else patches.mean(1, keepdim=True)
        return torch.cat([first, patches], 1)


def create_timm_model(name: str, image_size: int, weights: str, overrides: Mapping) -> Any:
    # timm loads strictly only if `num_classes` is that of the weights. The head is cut off later.
    options: dict[str, Any] = {"pretrained": True, **overrides}
    if weights == "random":
        options |= {"pretrained": False, "num_classes": 0}
    elif weights != "hub":
        os.stat(weights)  # timm's error does not say that there is none
        classes = {key: options[key] for key in ("num_classes",) if key in options}
        options["pretrained_cfg_overlay"] = {"file": weights, **classes}
    try:
        return timm.create_model(name, img_size=image_size, **options)
    except TypeError as error:
        if "'img_size'" not in str(error) or "multiple" in str(error):
            raise
        return timm.create_model(name, **options)  # a convolutional model takes any size


def last_block(stages: list[dict], layers: int | None, block: int | None) -> int:
    num_blocks = len(stages)
    if block is not None:
        if not -num_blocks <= block < num_blocks:
            raise ValueError(f"its blocks are 0 to {num_blocks - 1}, and teacher.block is {block}")
        return block % num_blocks
    plain = len({(stage["num_chs"], stage["reduction"]) for stage in stages}) == 1
    if layers is None:
        return (min(LAYERS, num_blocks) if plain else num_blocks) - 1
    if not plain or layers > num_blocks:
        parts = "blocks" if plain else "stages and no plain stack"
        raise ValueError(f"it has {num_blocks} {parts}, and student.layers is {layers}: give null")
    return layers - 1


def cut_timm_model(model: Any, last: int) -> None:
    # The pretrained final norm fits only the last block; student and teacher have their own.
    model.prune_intermediate_layers([last], prune_norm=True, prune_head=True)
    for blocks in CLASS_BLOCKS:  # which timm below 1.0.31 keeps, empty, with their class token
        if hasattr(model, blocks):
            setattr(model, blocks, None)
            model.cls_token = None


def blocks_of_stages(model: nn.Module, stages: Iterable[str]) -> list[nn.Module]:
    blocks: list[nn.Module] = []
    for number, name in enumerate(stages):
        stage = model.get_submodule(name)
        parts = getattr(stage, "blocks", stage)
        is_stem = "." not in name and number == 0
        if isinstance(parts, nn.Sequential | nn.ModuleList):
            blocks += parts
        elif next(stage.parameters(), None) is not None and not is_stem:
            blocks.append(stage)
    return blocks


class TextEncoder(nn.Module):
    """A model of transformers for its last hidden states: int64 and bool [B, M] -> [B, M, H].

    Attributes: `width` (H), `vocab_size` (of its table), `blocks`.
    """

    model: Any

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
        """Build the model. Raises errors of transformers, and ValueError.

        `name`: a family such as "bert", or a name of the hub; `vocab_size`, `pad_id`: the
        tokenizer's; `positions`: M of the longest text; `weights`: "hub", "random", a folder of
        transformers or a file; `layers`: the number of first layers to keep, None: `LAYERS`;
        `overrides`: fields of the family's configuration class.
        """
        super().__init__()
        fields = overrides or {}
        if weights == "random" or Path(weights).is_file():
            fields = {"vocab_size": vocab_size, "pad_token_id": pad_id, **fields}
            config = text_config(family(name), layers, dropout, **fields)
        else:
            place = name if weights == "hub" else weights
            if weights != "hub" and not Path(weights).exists():
                raise ValueError(f"its weights are {weights!r}: no such file or folder")
            config = text_config(place, layers, dropout, published=True, **fields)
        self.model = create_text_model(config, name, weights)
        if config.vocab_size < vocab_size:
            raise ValueError(
                f"it has {config.vocab_size} tokens and data.tokenizer {vocab_size}: choose the "
                "tokenizer that belongs to the model"
            )
        longest = max_text_length(self.model)
        if positions > longest:
            raise ValueError(f"data.context_length is {positions}, and it has only {longest}")
        self.width = config.hidden_size
        self.vocab_size = config.vocab_size
        causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        causal = causal and type(config) not in transformers.MODEL_FOR_MASKED_LM_MAPPING
        contrastive = config.model_type.endswith("_text_model")  # CLIP's and its like
        self.pooling = "last" if causal or contrastive else "first"
        if "t5" in config.model_type:
            self.pooling = "mean"  # it has no class token
        self.blocks = layers_of(self.model)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, padded: bool | None = None
    ) -> Tensor:
        """`padded`: True if a text of the batch is padded; None: unknown."""
        no_sync = padded is not None and input_ids.is_cuda
        mask = None if no_sync and not padded else attention_mask.long()
        # If it takes itself for traced, it reads no value of the mask: that is a CPU-GPU sync.
        traced = mock.patch.object(masking_utils, "is_tracing", lambda tensor=None: True)
        with traced if no_sync else nullcontext():
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


def family(name: str) -> str:
    """Return the architecture that a model's name begins with: "bert-base-uncased" -> "bert"."""
    *_, last_part = name.split("/")
    dashed = last_part.lower().replace("_", "-") + "-"
    for architecture in sorted(transformers.CONFIG_MAPPING, key=len, reverse=True):
        if dashed.startswith(architecture.lower().replace("_", "-") + "-"):
            return architecture
    raise ValueError(
        "without a configuration of its own, give an architecture of the transformers library, "
        "such as bert, t5 or clip"
    )


def text_config(
    name: str, layers: int | None, dropout: float, published: bool = False, **fields: Any
) -> PreTrainedConfig:
    """Return the configuration of a text encoder: of a family, or `published` (hub, folder).

    `layers`, `dropout` and `fields` are as in `TextEncoder`.
    """
    if published:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    else:
        config = transformers.AutoConfig.for_model(name)
    config = getattr(config, "text_config", None) or config
    config_class = type(config)
    values = config.to_dict()
    field_names = values.keys() | config_class.attribute_map.keys() | UNDECLARED
    if unknown := min(fields.keys() - field_names, default=None):
        raise ValueError(f"text_overrides has {unknown!r}: {nearest(unknown, values)}")
    # No dropout inside the attention: CPUs have no fused attention kernel with dropout.
    rates = {key: 0.0 for key in ATTENTION_DROPOUT if key in values}
    rates |= {key: dropout for key in DROPOUT if key in values}
    # Build it anew, because some classes compute fields from others.
    base = values if published else {}
    config = config_class(**base | rates | {"use_cache": False} | fields)
    depth = config.num_hidden_layers
    if layers is not None and layers > depth:
        raise ValueError(f"it has {depth} layers, and student.layers is {layers}")
    kept = min(LAYERS, depth) if layers is None else layers
    config.num_hidden_layers = kept
    if getattr(config, "layer_types", None):
        config.layer_types = list(config.layer_types[:kept])
    return config


def changed_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields with which `text_config` builds it again, but tokenizer's and dropout's."""
    usual = type(config)().to_dict()
    values = config.to_dict()
    common = inspect.signature(PreTrainedConfig).parameters.keys() - {"chunk_size_feed_forward"}
    declared = inspect.signature(type(config)).parameters.keys() | UNDECLARED
    names = declared - common - {*DROPOUT, *ATTENTION_DROPOUT, "vocab_size", "use_cache"}
    changed = [name for name in names & values.keys() if values[name] != usual.get(name)]
    return {name: values[name] for name in sorted(changed)}


def create_text_model(config: PreTrainedConfig, name: str, weights: str) -> Any:
    model_class = text_model_class(config)
    options: dict[str, Any] = {}
    # Otherwise a pooler is made, whose random weights would change those that follow.
    if "add_pooling_layer" in inspect.signature(model_class).parameters:
        options["add_pooling_layer"] = False
    if weights == "random":
        # The default dtype is what a user asks for in `from_pretrained` of a whole model.
        model = model_class._from_config(config, dtype=torch.get_default_dtype(), **options)
    else:
        is_file = Path(weights).is_file()
        place = name if weights == "hub" else weights
        model, keys = model_class.from_pretrained(
            None if is_file else place,
            config=config,
            state_dict=load_state_dict(weights) if is_file else None,
            local_files_only=weights != "hub",
            dtype=torch.float32,
            weights_only=True,
            output_loading_info=True,
            **options,
        )
        if missing := sorted(keys["missing_keys"]):
            raise ValueError(f"{weights!r} lacks {len(missing)} weights, such as {missing[0]}")
        model.train()
    for module in model.modules():
        if isinstance(getattr(module, "head", None), nn.Linear):
            module.head = nn.Identity()  # SigLIP's, after its own pooling
    return model


def text_model_class(config: PreTrainedConfig) -> Any:
    encoder_class = transformers.MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(config), None)
    model_class: Any = encoder_class or transformers.MODEL_MAPPING.get(type(config), None)
    if model_class is None:  # SigLIP's text model is in neither table
        model_class = getattr(transformers, type(config).__name__.replace("Config", "Model"))
    has_decoder = getattr(config, "is_encoder_decoder", False) and encoder_class is None
    if has_decoder or model_class.main_input_name != "input_ids":
        raise ValueError(f"transformers has no text encoder of {config.model_type!r} alone")
    return model_class


def max_text_length(model: Any) -> float:
    """Return how many tokens a text model of transformers takes; infinity if it has no limit."""
    length = getattr(model.config, "max_position_embeddings", None) or float("inf")
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            length -= padding + 1  # RoBERTa's positions begin after the row of the padding index
    return length


def layers_of(model: Any) -> list[nn.Module]:
    num_layers = model.config.num_hidden_layers
    stacks = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    stacks = [stack for stack in stacks if len(stack) == num_layers]
    if not stacks:
        return [model.encoder]  # ALBERT's, whose layers share their weights
    largest = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))
    return list(largest)
