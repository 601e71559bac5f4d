"""Builds text models of transformers and loads their weights; mistakes are `UserError`.

Only the layers that compute a hidden state for each token are kept: the encoder of an
encoder-decoder, the text part of an image-text model, without pooler and head. Shapes: B texts, M
text positions, H width.
"""

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from ds_cmli.common.errors import UserError, check_regular, nearest
from ds_cmli.common.pretrained import loading, reason
from ds_cmli.models.backbone import DEFAULT_LAYERS, TextRequest
from ds_cmli.models.weights import Shape, account, check_finite, check_room, count, say

# The configuration fields, over all families, of the dropout after layers and of the dropout inside
# the attention.
DROPOUT = (
    "hidden_dropout_prob",
    "dropout",
    "dropout_rate",
    "resid_pdrop",
    "embd_pdrop",
    "embedding_dropout",
    "mlp_dropout",
)
ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
# The fields that `text_overrides` cannot change, and the setting that decides them.
DECIDED = {"vocab_size": "data.tokenizer", **dict.fromkeys(DROPOUT, "student.dropout")}
# Fields of single families that do not affect the encoder: they configure heads, generation or
# decoding.
UNUSED = {
    "add_cross_attention",
    "bos_token_id",
    "classifier_dropout",
    "cls_token_id",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "eos_token_id",
    "gradient_checkpointing",
    "is_decoder",
    "model_type",
    "num_decoder_layers",
    "sep_token_id",
    "tie_word_embeddings",
    "use_cache",
}
# The names that the families give to the table of token embeddings in their weights.
TOKEN_TABLES = (
    "word_embeddings.weight",
    "shared.weight",
    "embed_tokens.weight",
    "token_embedding.weight",
    "tok_embeddings.weight",
    "wte.weight",
)
# Fields that these families read although their configuration classes do not declare them.
UNDECLARED = {
    "deberta": ("embedding_size", "talking_head"),
    "deberta-v2": (
        "attention_head_size",
        "conv_act",
        "conv_groups",
        "conv_kernel_size",
        "embedding_size",
        "norm_rel_ebd",
        "position_buckets",
        "share_att_key",
    ),
}


def family(model: str) -> str:
    """The architecture that a model's name begins with: "bert-base-uncased" -> "bert"."""
    plain = _dashed(model.rsplit("/", 1)[-1])
    known = [kind for kind in CONFIG_MAPPING if plain.startswith(_dashed(kind))]
    if not known:
        raise UserError(
            f"student.text_model is {model!r}: without a configuration of its own (random weights, "
            "or a file of weights), give an architecture of the transformers library, such as "
            "bert, t5 or clip"
        )
    longest = max(known, key=len)
    part = getattr(CONFIG_MAPPING[longest], "sub_configs", {}).get("text_config")
    return getattr(part, "model_type", "") or longest


def _dashed(name: str) -> str:
    return name.lower().replace("_", "-") + "-"


def without_effect(kind: type[PreTrainedConfig], name: str) -> str | None:
    """Why a field of `text_overrides` has no effect or is refused; None if it has an effect."""
    if name in DECIDED:
        return f"{DECIDED[name]} decides that"
    common = inspect.signature(PreTrainedConfig).parameters.keys() - {"chunk_size_feed_forward"}
    if name in UNUSED or name in common:
        return "it decides nothing of a text encoder"
    known = inspect.signature(kind).parameters.keys() | kind.attribute_map.keys()
    if name in known or name in UNDECLARED.get(kind.model_type, ()):
        return None
    return nearest(name, known - common - UNUSED - DECIDED.keys())


def text_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the text encoder, which of CLIP and its like is a part."""
    return getattr(config, "text_config", None) or config


def kind_of(request: TextRequest) -> type[PreTrainedConfig] | None:
    """The class of the model's configuration; None if unknown, in which case `create` says why."""
    if Path(request.weights).is_dir():
        check_regular(f"{request.source.setting} is {request.weights!r}", Path(request.weights))
    else:
        try:
            return CONFIG_MAPPING[family(request.model)]  # the name is enough, the hub is not asked
        except UserError:
            pass
    try:
        with loading(hub=request.weights == "hub"):
            return type(_configured(request))
    except Exception:
        return None


def create(request: TextRequest) -> tuple[PreTrainedModel, int | None]:
    """Create the model, cut to its first layers, on the CPU in fp32; raises `UserError`.

    Also returns how many layers it had; None: it has no plain stack of them.
    """
    source, weights = request.source, request.weights
    if weights not in ("random", "hub") and not Path(weights).exists():
        raise source.error(
            "no such file or folder; give 'hub', 'random', the folder of a transformers model "
            f"with its config.json, or a weights file of {request.model}"
        )
    try:
        with loading(hub=weights == "hub"):
            config = _configured(request)
            depth = getattr(config, "num_hidden_layers", None)
            kept = _sized(request, config)
            model: Any = _build(request, config)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{source.setting} is {weights!r}, the model {request.model!r}: cannot load it: "
            f"{reason(error)}"
        ) from None
    if model.config.vocab_size < request.vocab_size:
        raise UserError(
            f"data.tokenizer has {request.vocab_size} tokens and {request.name} only "
            f"{model.config.vocab_size}: choose the tokenizer that belongs to the model"
        )
    if kept is None:
        say(f"{request.name} has no plain stack of layers: it is kept whole", model)
    return model.train(), depth  # `from_pretrained` returns it in eval mode, without dropout


def _is_file(request: TextRequest) -> bool:
    return request.weights not in ("random", "hub") and Path(request.weights).is_file()


def _configured(request: TextRequest) -> PreTrainedConfig:
    """The configuration of the model, or the default one of its family, with the user's changes."""
    own = request.weights != "random" and not _is_file(request)  # whether the model has one
    if not own:
        configure = partial(AutoConfig.for_model, family(request.model))
    else:
        where = request.model if request.weights == "hub" else request.weights
        configure = partial(
            AutoConfig.from_pretrained,
            where,
            local_files_only=request.weights != "hub",
            trust_remote_code=False,
        )
    plain = text_part(configure())
    kind = type(plain)
    for field, value in request.overrides.items():
        why = without_effect(kind, field)
        if why is not None:
            raise UserError(f"student.text_overrides has {field!r} = {value!r}: {why}")
    fields = inspect.signature(kind).parameters
    # No dropout inside the attention: CPUs have no fused attention kernel with dropout.
    sizes: dict[str, Any] = {name: 0.0 for name in ATTENTION_DROPOUT if name in fields}
    sizes |= {name: request.dropout for name in DROPOUT if name in fields}
    sizes |= request.overrides
    if own:
        if type(configure()) is kind:
            return configure(**sizes)
        return kind(**(plain.to_dict() | sizes))
    sizes["vocab_size"] = request.vocab_size
    if _is_file(request):
        for key, value in _read(request.weights).items():
            if key.endswith(TOKEN_TABLES):
                sizes["vocab_size"] = len(value)
                break
    if "pad_token_id" in fields:
        # The fields of special tokens are rows of the embedding table, so they must be the
        # tokenizer's ids.
        sizes.setdefault("pad_token_id", request.special.pad_id)
    return kind(**sizes)


def _sized(request: TextRequest, config: Any) -> int | None:
    """Set the number of layers to keep in `config` and return it; None if it has no such field."""
    depth = getattr(config, "num_hidden_layers", None)
    if depth is None:
        if request.layers is not None:
            raise request.unfit(
                f"it has no plain stack, of which the first student.layers = {request.layers} "
                "could be kept: give student.layers=null, and it is kept whole"
            )
        return None
    # Weights may have more layers than their configuration says; if they have fewer than asked,
    # `account` reports it.
    kept = min(DEFAULT_LAYERS, depth) if request.layers is None else request.layers
    decided = request.weights == "random" or "num_hidden_layers" in request.overrides
    if decided and kept > depth:
        raise UserError(f"student.layers is {kept}: {request.name} has only {depth}")
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = kept
    if kinds:
        config.layer_types = list(kinds[:kept])
    return kept


def _build(request: TextRequest, config: PreTrainedConfig) -> PreTrainedModel:
    # The class is looked up here because AutoModel would look for code in the folder.
    text_encoding = MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(config), None)
    # The text part of an image-text model may be in neither table.
    part = getattr(transformers, type(config).__name__.replace("TextConfig", "TextModel"))
    model: Any = text_encoding or MODEL_MAPPING.get(type(config), part)
    if not issubclass(model, PreTrainedModel) or model.main_input_name != "input_ids":
        raise ValueError(f"{config.model_type!r} is no text encoder")
    if getattr(config, "is_encoder_decoder", False) and text_encoding is None:
        raise request.unfit(
            "its encoder does not come without its decoder in transformers: choose another model"
        )
    options: dict[str, Any] = {}
    if "add_pooling_layer" in inspect.signature(model).parameters:
        options["add_pooling_layer"] = False
    if not isinstance(torch.empty(0), FakeTensor):
        with torch.device("meta"):
            parameters = count(model._from_config(config, **options))
        check_room("student.text_model", request.model, parameters)
    if not request.pretrained or request.weights == "random":
        return model._from_config(config, dtype=torch.float32, **options)
    where: Any = request.model if request.weights == "hub" else request.weights
    if _is_file(request):
        where, options["state_dict"] = None, _read(request.weights)
    encoder, info = model.from_pretrained(
        where,
        config=config,
        local_files_only=request.weights != "hub",
        dtype=torch.float32,
        weights_only=True,
        ignore_mismatched_sizes=True,  # `account` refuses them with one line
        output_loading_info=True,
        **options,
    )
    check_finite(request.source, encoder)
    given: dict[str, Shape] = {}
    for key, tensor in encoder.state_dict().items():
        if key not in info["missing_keys"]:
            given[key] = tuple(tensor.shape)
    for key, shape, _ in info["mismatched_keys"]:
        given[key] = tuple(shape)
    given |= dict.fromkeys(sorted(info["unexpected_keys"]), ())
    account(request.source, encoder, given, before={})
    return encoder


def _read(file: str) -> dict[str, Tensor]:
    # Reads .safetensors, or a file that torch.save wrote.
    return timm.models.load_state_dict(file, weights_only=True)
