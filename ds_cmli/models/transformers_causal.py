"""Text models pooled at their last token, such as causal models, in which only it attends to all tokens (CLIP, GPT-2).

Shapes: B texts, M text positions, H any width.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from ds_cmli.models.backbone import TextRequest
from ds_cmli.models.transformers_model import Transformer, kind_of

# Text encoders of contrastive models: they have no language modeling head, so the two tables do not list them.
CONTRASTIVE = ("clip_text_model", "chinese_clip_text_model", "clipseg_text_model", "owlvit_text_model",
               "owlv2_text_model", "siglip_text_model", "siglip2_text_model", "metaclip_2_text_model")  # fmt: skip


def at_the_end(kind: Any) -> bool:
    """Whether models with this configuration class are pooled at their last token."""
    if kind is None:
        return False
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING
    return causal or kind.model_type in CONTRASTIVE


class Causal(Transformer):
    """Pooled at the last attended position: the end token if the tokenizer adds one, or else the last word."""

    @classmethod
    def takes(cls, request: TextRequest) -> bool:
        return at_the_end(kind_of(request))

    def pool(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        rows = torch.arange(len(tokens), device=tokens.device)
        return tokens[rows, attention_mask.sum(1) - 1]
