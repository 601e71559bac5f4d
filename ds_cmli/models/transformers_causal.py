"""Text models that are pooled at the end token: causal ones, whose earlier tokens do not see it (CLIP, GPT-2).

Shapes: B texts, M text positions, H any width.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from ds_cmli.models.backbone import TextRequest
from ds_cmli.models.transformers_model import Transformer, kind_of

# Text encoders of contrastive models, which are trained without a language model's head.
CONTRASTIVE = ("clip_text_model", "chinese_clip_text_model", "clipseg_text_model", "owlvit_text_model",
               "owlv2_text_model", "siglip_text_model", "siglip2_text_model", "metaclip_2_text_model")  # fmt: skip


def at_the_end(kind: Any) -> bool:
    """Whether a model of this class of configurations is pooled at its last token."""
    if kind is None:
        return False
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING
    return causal or kind.model_type in CONTRASTIVE


class Causal(Transformer):
    """The last position that is attended to is the end token, where the tokenizer adds one, or else the last word."""

    @classmethod
    def takes(cls, request: TextRequest) -> bool:
        return at_the_end(kind_of(request))

    def pool(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        rows = torch.arange(len(tokens), device=tokens.device)
        return tokens[rows, attention_mask.sum(1) - 1]
