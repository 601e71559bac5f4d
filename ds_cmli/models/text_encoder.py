"""Text encoders: BERT-like ones of the transformers library, their first layers, without pooler.

Shapes: B texts, M text positions.
"""

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoConfig, PreTrainedConfig

from ds_cmli.common.errors import UserError, nearest
from ds_cmli.common.pretrained import loading, reason
from ds_cmli.config.schema import StudentConfig
from ds_cmli.models.weights import Source, account, check_finite

# What `text_overrides` cannot change, and which setting does.
DECIDED = {"vocab_size": "data.tokenizer", "hidden_dropout_prob": "student.dropout"}
# Fields of single families that decide nothing of the encoder: heads, generation, decoding.
UNUSED = {
    *("use_cache", "classifier_dropout", "tie_word_embeddings", "is_decoder", "add_cross_attention"),
    *("bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id"),
    *("gradient_checkpointing", "cross_attention_hidden_size", "model_type"),
}


def family(model: str) -> str:
    """The architecture that a model's name begins with: "bert-base-uncased" -> "bert"."""
    plain = model.rsplit("/", 1)[-1].lower().replace("_", "-") + "-"
    known = [kind for kind in CONFIG_MAPPING if plain.startswith(kind.lower().replace("_", "-") + "-")]
    if not known:
        raise UserError(
            f"student.text_model is {model!r}: with random weights, give an architecture of the transformers library, "
            "such as bert or xlm-roberta"
        )
    return max(known, key=len)


def without_effect(kind: type[PreTrainedConfig], name: str) -> str | None:
    """Why a field of `text_overrides` would do nothing, or why it is refused; None where it decides something."""
    if name in DECIDED:
        return f"{DECIDED[name]} decides that"
    fields = inspect.signature(kind).parameters
    common = inspect.signature(PreTrainedConfig).parameters.keys() - {"chunk_size_feed_forward"}
    if name in UNUSED or name in common:
        return "it decides nothing of a text encoder"
    if name not in fields and name not in kind.attribute_map:
        return nearest(name, fields.keys() - common - UNUSED - DECIDED.keys())
    return None


def build_text_encoder(config: StudentConfig, vocab_size: int, pretrained: bool = True) -> Any:
    """A BERT-like encoder of the transformers library, its first `config.layers` layers, without pooler.

    Args:
        vocab_size: of the tokenizer.
        pretrained: False: random weights in the sizes of the configured ones, to be overwritten.
    """
    name, weights = config.text_model, config.text_weights
    source = Source("student.text_weights", weights, config.weights_partial)
    where = name if weights == "hub" else weights
    if weights not in ("random", "hub") and not Path(weights).is_dir():
        found = "a file" if Path(weights).is_file() else "no such folder"
        raise source.error(f"{found}; give 'hub', 'random', or the folder of a transformers model with its config.json")
    try:
        with loading(hub=weights == "hub"):
            if weights == "random":
                configure = partial(AutoConfig.for_model, family(name))
            else:
                configure = partial(
                    AutoConfig.from_pretrained, where, local_files_only=weights != "hub", trust_remote_code=False
                )
            sizes = _sizes(config, type(configure()), vocab_size)
            encoder = _build(source, where, configure(**sizes), pretrained and weights != "random")
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{source.setting} is {weights!r}, the model {name!r}: cannot load it: {reason(error)}"
        ) from None
    if not isinstance(getattr(getattr(encoder, "encoder", None), "layer", None), nn.ModuleList):
        raise UserError(f"student.text_model is {name!r}: choose a BERT-like encoder (encoder.layer)")
    if encoder.config.vocab_size < vocab_size:
        raise UserError(
            f"data.tokenizer has {vocab_size} tokens and student.text_model {name!r} only {encoder.config.vocab_size}: "
            "choose the tokenizer that belongs to the model"
        )
    return encoder.train()  # it comes in eval mode out of a file, with its dropout off


def _sizes(config: StudentConfig, kind: type[PreTrainedConfig], vocab_size: int) -> dict[str, Any]:
    """The fields to change in a family's or a model's own configuration."""
    for field, value in config.text_overrides.items():
        why = without_effect(kind, field)
        if why is not None:
            raise UserError(f"student.text_overrides has {field!r} = {value!r}: {why}")
    # None in the attention: CPUs have no fused kernel with dropout.
    sizes = {"hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": 0.0, **config.text_overrides}
    if config.text_weights == "random":
        return {**sizes, "vocab_size": vocab_size}
    given = config.text_overrides.get("num_hidden_layers", config.layers)
    if given < config.layers:
        raise UserError(f"student.layers is {config.layers}: student.text_overrides.num_hidden_layers is only {given}")
    return {**sizes, "num_hidden_layers": config.layers}


def _build(source: Source, where: str, config: PreTrainedConfig, pretrained: bool) -> Any:
    # By its class and not by AutoModel, which would look for code in the folder.
    try:
        model: Any = MODEL_MAPPING[type(config)]
    except KeyError:
        raise ValueError(f"{config.model_type!r} is no encoder") from None
    options = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(model).parameters else {}
    if not pretrained:
        return model._from_config(config, dtype=torch.float32, **options)
    encoder, info = model.from_pretrained(
        where,
        config=config,
        local_files_only=source.weights != "hub",
        dtype=torch.float32,
        weights_only=True,
        ignore_mismatched_sizes=True,  # `account` refuses them, in one line
        output_loading_info=True,
        **options,
    )
    check_finite(source, encoder)
    missing = set(info["missing_keys"])
    given = {key: tuple(tensor.shape) for key, tensor in encoder.state_dict().items() if key not in missing}
    given |= {key: tuple(shape) for key, shape, _ in info["mismatched_keys"]}
    account(source, encoder, {**given, **dict.fromkeys(sorted(info["unexpected_keys"]), ())}, {})
    return encoder


def most_positions(encoder: Any) -> int | None:
    """How long a text can be; None where no table of positions says so."""
    table = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    if not isinstance(table, nn.Embedding):
        return None
    # RoBERTa's positions begin behind the one of padding.
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
