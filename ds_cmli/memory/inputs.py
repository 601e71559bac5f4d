"""The inputs of a predicted or measured step: random models, and batches without real data."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig

from ds_cmli.config.presets import MINILM_SIZES
from ds_cmli.config.schema import Config
from ds_cmli.data.pairs import Batch
from ds_cmli.data.tokens import tokenizer_of
from ds_cmli.errors import UserError, blame
from ds_cmli.models.encoders import changed_fields, family

# Text models whose sizes are the defaults of their family in transformers: they need no download.
FAMILY_SIZES = ("bert", "bert-base-uncased", "bert-base-cased", "roberta", "roberta-base")


def without_weights(config: Config) -> tuple[Config, int]:
    """Return the configuration with random weights of the same sizes, and the vocabulary's size.

    It is without compilation. Raises `UserError` for a text model whose sizes are neither known
    here, nor given, nor on this machine.
    """
    student = replace(config.student, source="")
    data = config.data
    vocab_size: int | None = None  # None: that of the text model's family
    if student.source_config:
        vocab_size = 0  # its text encoder has its own table
    elif student.text_weights == "random" or Path(student.text_weights).is_file():
        if data.tokenizer == "builtin" or Path(data.tokenizer).is_dir():
            vocab_size = tokenizer_of(data).vocab_size
    elif student.text_weights == "demo":
        student = replace(student, text_overrides=MINILM_SIZES | student.text_overrides)
    else:
        source = student.text_model if student.text_weights == "hub" else student.text_weights
        try:
            whole = AutoConfig.from_pretrained(
                source, local_files_only=True, trust_remote_code=False
            )
            encoder = getattr(whole, "text_config", None) or whole
            vocab_size = encoder.vocab_size
            overrides = {**changed_fields(encoder), **student.text_overrides}
            student = replace(student, text_model=encoder.model_type, text_overrides=overrides)
        except Exception:
            if source not in FAMILY_SIZES and "hidden_size" not in student.text_overrides:
                raise UserError(
                    f"student.text_model is {source!r}: its sizes are not known without a download:"
                    " give them in student.text_overrides, or start it once"
                ) from None
    if vocab_size is None:
        with blame(f"student.text_model is {student.text_model!r}"):
            vocab_size = AutoConfig.for_model(family(student.text_model)).vocab_size
    config = replace(
        config,
        student=replace(student, image_weights="random", text_weights="random"),
        teacher=replace(config.teacher, weights="random"),
        run=replace(config.run, compile="off"),
    )
    return config, vocab_size


def longest_batch(config: Config, micro_batch: int, positions: int | None = None) -> Batch:
    """Return a batch of constants in the shapes of the largest batch, with texts of `positions`.

    Its tensors are fake inside a `FakeTensorMode`, otherwise real. All texts are full but the
    first: it lacks a token.
    """
    B = micro_batch
    M = positions or config.data.context_length
    S = config.data.image_size
    attention_mask = torch.ones(B, M, dtype=torch.bool)
    attention_mask[0, -1] = config.data.padding == "full"
    token_mask = attention_mask.clone()
    token_mask[:, 0] = False  # [CLS]
    token_mask[:, -1] = False  # [SEP]
    token_mask[0, -2] = False
    input_ids = torch.zeros(B, M, dtype=torch.int64)
    # If all tokens are alike, gradients can be not finite, and the optimizer step is skipped.
    input_ids[:, ::2] = 3
    return Batch(
        image=torch.zeros(B, 3, S, S, dtype=torch.uint8),
        input_ids=input_ids,
        attention_mask=attention_mask,
        token_mask=token_mask,
        index=torch.zeros(B, dtype=torch.int64),
        pair_id=torch.arange(2 * B).view(B, -1),
        bad=[],
        padded=config.data.padding != "full",
    )
