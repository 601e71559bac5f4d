"""Text encoders of the transformers library, used for their last hidden states, and their poolings.

Shapes: B texts, M text positions, H any width.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from ds_cmli.common.errors import UserError
from ds_cmli.common.patches import patched
from ds_cmli.models.backbone import TextBackbone, TextRequest
from ds_cmli.models.transformers_model import DROPOUT, create, kind_of
from ds_cmli.models.weights import count, say

# Text encoders of contrastive models: they have no language modeling head, so the two tables do not
# list them.
CONTRASTIVE = (
    "clip_text_model",
    "chinese_clip_text_model",
    "clipseg_text_model",
    "owlvit_text_model",
    "owlv2_text_model",
    "siglip_text_model",
    "siglip2_text_model",
    "metaclip_2_text_model",
)
POSITION_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")


class Transformer(TextBackbone):
    """A model of the transformers library, used for its last hidden states."""

    model: Any

    def __init__(self, request: TextRequest):
        super().__init__()
        self.model, self.depth = create(request)
        # The key-value cache is for generation: here it would waste memory, twice under activation
        # checkpointing.
        self.model.config.use_cache = False
        for module in self.model.modules():
            if isinstance(getattr(module, "head", None), nn.Linear):
                module.head = nn.Identity()  # SigLIP's, which follows its own pooling
        self.width = self.model.config.hidden_size
        self.most_positions = _most_positions(self.model)
        self._check_special_tokens(request)
        if request.dropout and not any(name in vars(self.model.config) for name in DROPOUT):
            say(
                f"{request.name} has no dropout behind its layers: student.dropout has no effect "
                "on it",
                self.model,
            )

    def _check_special_tokens(self, request: TextRequest) -> None:
        table = _position_table(self.model)
        counts_from = table.padding_idx if table is not None else None
        if counts_from is None or counts_from == request.special.pad_id:
            return
        problem = (
            f"data.tokenizer fills up texts with the id {request.special.pad_id}, and "
            f"{request.name} counts positions by the id {counts_from}"
        )
        if request.weights != "random":
            raise UserError(f"{problem}: choose the tokenizer that belongs to the model")
        # Harmless with untrained weights.
        say(f"{problem}, which then has a position of its own", self.model)

    @property
    def blocks(self) -> list[nn.Module]:
        return blocks_of(self.model)

    def read_outside(self) -> Iterator[tuple[nn.Module, nn.Parameter]]:
        # CLIP's and its like read the size of their table of positions outside of its forward.
        for module in self.model.modules():
            table = getattr(module, "position_embedding", None)
            if isinstance(table, nn.Embedding):
                yield module, cast("nn.Parameter", table.weight)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # An integer mask is accepted by the encoders of every transformers version.
        mask = attention_mask.long()
        if self.padded is None or not input_ids.is_cuda:
            return self.model(input_ids=input_ids, attention_mask=mask).last_hidden_state
        if not self.padded:
            return self.model(input_ids=input_ids).last_hidden_state
        # "Traced", it builds the mask without a look at its values, which is a CPU-GPU sync.
        with patched("transformers: mask", lambda _: lambda tensor=None: True):
            return self.model(input_ids=input_ids, attention_mask=mask).last_hidden_state


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a text model, which activation checkpointing recomputes."""
    depth = getattr(model.config, "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    stacks = [stack for stack in lists if len(stack) == depth]
    if stacks:
        most = max(stacks, key=lambda stack: count(stack))
        return list(most)
    # Layers that share their weights (ALBERT) are one block, because each parameter's gradient
    # must arrive once: the first part with a list of layers.
    parts = [m for m in model.children() if not isinstance(m, nn.Embedding)]
    for part in parts:
        if any(isinstance(m, nn.ModuleList) for m in part.modules()):
            return [part]
    return parts[:1]


def _position_table(model: nn.Module) -> nn.Embedding | None:
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in POSITION_TABLES and isinstance(module, nn.Embedding):
            return module
    return None


def _most_positions(model: PreTrainedModel) -> int | None:
    """The greatest length of a text by its position embeddings; None: any length."""
    table = _position_table(model)
    if table is None:
        return getattr(model.config, "max_position_embeddings", None)
    if table.padding_idx is None:
        return table.num_embeddings
    # RoBERTa's positions begin after the row of the padding index.
    return table.num_embeddings - table.padding_idx - 1


def at_the_end(kind: type[PreTrainedConfig] | None) -> bool:
    """Whether models with this configuration class are pooled at their last token."""
    if kind is None:
        return False
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING
    return causal or kind.model_type in CONTRASTIVE


class Causal(Transformer):
    """Pooled at the last attended position: the end token, or else the last word."""

    @classmethod
    def takes(cls, request: TextRequest) -> bool:
        return at_the_end(kind_of(request))

    def pool(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        rows = torch.arange(len(tokens), device=tokens.device)
        return tokens[rows, attention_mask.sum(1) - 1]


class Encoder(Transformer):
    """Pooled at the class token, which is the first; T5 has none, its tokens are averaged."""

    @classmethod
    def takes(cls, request: TextRequest) -> bool:
        return not at_the_end(kind_of(request))

    def __init__(self, request: TextRequest):
        super().__init__(request)
        both = getattr(self.model.config, "is_encoder_decoder", False)
        self.by_mean = bool(both) or "T5" in type(self.model).__name__
        if self.by_mean:
            say(
                f"{request.name} has no class token: the mean of its tokens stands for it",
                self.model,
            )
        elif not request.special.class_first:
            raise UserError(
                f"data.tokenizer begins a text with no class token, by which {request.name} is "
                "pooled: choose the tokenizer that belongs to the model, or "
                "student.text_backbone=causal, which pools at the end"
            )

    def pool(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        if not self.by_mean:
            return tokens[:, 0]
        share = attention_mask.to(tokens.dtype) / attention_mask.sum(1, keepdim=True)  # [B, M]
        return (share[:, None] @ tokens)[:, 0]  # [B, H]; the matrix product accumulates in fp32
