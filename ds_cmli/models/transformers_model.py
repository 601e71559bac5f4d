"""Building text models of the transformers library and loading their weights; each mistake is a
one-line `UserError`.

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

from ds_cmli.common.errors import UserError, nearest
from ds_cmli.common.pretrained import loading, reason
from ds_cmli.models.backbone import DEFAULT_LAYERS, TextRequest
from ds_cmli.models.weights import account, check_finite, check_room, count, say

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
    *(
        "use_cache",
        "classifier_dropout",
        "tie_word_embeddings",
        "is_decoder",
        "add_cross_attention",
    ),
    *("bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id"),
    *("gradient_checkpointing", "cross_attention_hidden_size", "model_type", "num_decoder_layers"),
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
    """The architecture at the start of a model's name: "bert-base-uncased" -> "bert", "clip" ->
    "clip_text_model".
    """
    plain = model.rsplit("/", 1)[-1].lower().replace("_", "-") + "-"
    known = [
        kind for kind in CONFIG_MAPPING if plain.startswith(kind.lower().replace("_", "-") + "-")
    ]
    if not known:
        raise UserError(
            f"student.text_model is {model!r}: without a configuration of its own (random weights, or a file of "
            "weights), give an architecture of the transformers library, such as bert, t5 or clip"
        )
    found = max(known, key=len)
    part = getattr(CONFIG_MAPPING[found], "sub_configs", {}).get("text_config")
    return getattr(part, "model_type", "") or found


def without_effect(kind: type[PreTrainedConfig], name: str) -> str | None:
    """Why a field of `text_overrides` has no effect or is refused; None if it has an effect."""
    if name in DECIDED:
        return f"{DECIDED[name]} decides that"
    fields = inspect.signature(kind).parameters
    common = inspect.signature(PreTrainedConfig).parameters.keys() - {"chunk_size_feed_forward"}
    if name in UNUSED or name in common:
        return "it decides nothing of a text encoder"
    if (
        name not in fields
        and name not in kind.attribute_map
        and name not in UNDECLARED.get(kind.model_type, ())
    ):
        return nearest(
            name, (fields.keys() | kind.attribute_map.keys()) - common - UNUSED - DECIDED.keys()
        )
    return None


def text_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the text encoder: for an image-text model, such as CLIP, it is a part of
    the model's.
    """
    return getattr(config, "text_config", None) or config


def kind_of(request: TextRequest) -> type[PreTrainedConfig] | None:
    """The class of the model's configuration; None if it cannot be determined, in which case
    `create` says why.
    """
    if not Path(request.weights).is_dir():
        try:
            return CONFIG_MAPPING[family(request.model)]  # the name is enough, the hub is not asked
        except UserError:
            pass
    try:
        with loading(hub=request.weights == "hub"):
            return type(_configured(request))
    except Exception:
        return None


def create(request: TextRequest) -> Any:
    """Create the model, cut to its first layers, on the CPU in fp32; raises `UserError`."""
    source, weights = request.source, request.weights
    if weights not in ("random", "hub") and not Path(weights).exists():
        raise source.error(
            "no such file or folder; give 'hub', 'random', the folder of a transformers model with its config.json, or "
            f"a weights file of {request.model}"
        )
    try:
        with loading(hub=weights == "hub"):
            config = _configured(request)
            kept = _sized(request, config)
            model = _build(request, config)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{source.setting} is {weights!r}, the model {request.model!r}: cannot load it: {reason(error)}"
        ) from None
    if model.config.vocab_size < request.vocab_size:
        raise UserError(
            f"data.tokenizer has {request.vocab_size} tokens and {request.name} only {model.config.vocab_size}: choose "
            "the tokenizer that belongs to the model"
        )
    if kept is None:
        say(f"{request.name} has no plain stack of layers: it is kept whole", model)
    return model.train()  # `from_pretrained` returns it in eval mode, without dropout


def _is_file(request: TextRequest) -> bool:
    return request.weights not in ("random", "hub") and Path(request.weights).is_file()


def _configured(request: TextRequest) -> PreTrainedConfig:
    """The configuration of the model, or the default one of its family, with the user's changes."""
    if request.weights == "random" or _is_file(request):
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
    kind: Any = type(plain)
    for field, value in request.overrides.items():
        why = without_effect(kind, field)
        if why is not None:
            raise UserError(f"student.text_overrides has {field!r} = {value!r}: {why}")
    fields = inspect.signature(kind).parameters
    # No dropout inside the attention: CPUs have no fused attention kernel with dropout.
    sizes: dict[str, Any] = {name: 0.0 for name in ATTENTION_DROPOUT if name in fields}
    sizes |= {name: request.dropout for name in DROPOUT if name in fields}
    sizes |= request.overrides
    if request.weights == "random":
        sizes["vocab_size"] = request.vocab_size
    elif _is_file(request):
        state = _read(request.weights)
        rows = [len(value) for key, value in state.items() if key.endswith(TOKEN_TABLES)]
        sizes["vocab_size"] = rows[0] if rows else request.vocab_size
    if request.weights == "random" or _is_file(request):
        # The fields of special tokens are rows of the embedding table, so they must be the
        # tokenizer's ids.
        special = {"pad_token_id": request.special.pad_id} if "pad_token_id" in fields else {}
        return kind(**{**special, **sizes})
    if type(configure()) is kind:
        return configure(**sizes)
    return kind(**{**plain.to_dict(), **sizes})


def _sized(request: TextRequest, config: Any) -> int | None:
    """Set the number of layers that are kept in `config` and return it; None if the family has no
    such field.
    """
    depth = getattr(config, "num_hidden_layers", None)
    if depth is None:
        if request.layers is not None:
            raise request.unfit(
                f"it has no plain stack, of which the first student.layers = {request.layers} could be kept: give "
                "student.layers=null, and it is kept whole"
            )
        return None
    # Weights may have more layers than their configuration says; if they have fewer than asked,
    # `account` reports it.
    most = (
        depth if request.weights == "random" or "num_hidden_layers" in request.overrides else None
    )
    if request.layers is not None and most is not None and request.layers > most:
        raise UserError(f"student.layers is {request.layers}: {request.name} has only {most}")
    kept = min(DEFAULT_LAYERS, depth) if request.layers is None else request.layers
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = kept
    if kinds:
        config.layer_types = list(kinds[:kept])
    return kept


def _build(request: TextRequest, config: PreTrainedConfig) -> Any:
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
    options: dict[str, Any] = (
        {"add_pooling_layer": False}
        if "add_pooling_layer" in inspect.signature(model).parameters
        else {}
    )
    if not isinstance(torch.empty(0), FakeTensor):
        with torch.device("meta"):
            parameters = count(model._from_config(config, **options))
        check_room("student.text_model", request.model, parameters)
    if not request.pretrained or request.weights == "random":
        return model._from_config(config, dtype=torch.float32, **options)
    where: Any = request.model if request.weights == "hub" else request.weights
    if _is_file(request):
        where, options = None, {**options, "state_dict": _read(request.weights)}
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
    missing = set(info["missing_keys"])
    given = {
        key: tuple(tensor.shape)
        for key, tensor in encoder.state_dict().items()
        if key not in missing
    }
    given |= {key: tuple(shape) for key, shape, _ in info["mismatched_keys"]}
    account(
        request.source, encoder, {**given, **dict.fromkeys(sorted(info["unexpected_keys"]), ())}, {}
    )
    return encoder


def _read(file: str) -> dict[str, Tensor]:
    return timm.models.load_state_dict(
        file, weights_only=True
    )  # reads .safetensors, or a file that torch.save wrote
