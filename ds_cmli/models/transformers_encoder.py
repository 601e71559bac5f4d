"""Text encoders with bidirectional attention: BERT, RoBERTa, DistilBERT, ALBERT, DeBERTa, ModernBERT, T5.

Shapes: B texts, M text positions, H any width.
"""

from torch import Tensor

from ds_cmli.common.errors import UserError
from ds_cmli.models.backbone import TextRequest
from ds_cmli.models.transformers_causal import at_the_end
from ds_cmli.models.transformers_model import Transformer, kind_of
from ds_cmli.models.weights import say


class Encoder(Transformer):
    """Pooled at the class token, which is the first; a T5 encoder has none and is pooled by the mean of its tokens."""

    @classmethod
    def takes(cls, request: TextRequest) -> bool:
        return not at_the_end(kind_of(request))

    def __init__(self, request: TextRequest):
        super().__init__(request)
        self.by_mean = (
            bool(getattr(self.model.config, "is_encoder_decoder", False))
            or "T5" in type(self.model).__name__
        )
        if self.by_mean:
            say(
                f"{request.name} has no class token: the mean of its tokens stands for it",
                self.model,
            )
        elif not request.special.class_first:
            raise UserError(
                f"data.tokenizer begins a text with no class token, by which {request.name} is pooled: choose the "
                "tokenizer that belongs to the model, or student.text_backbone=causal, which pools at the end"
            )

    def pool(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        if not self.by_mean:
            return tokens[:, 0]
        share = attention_mask.to(tokens.dtype) / attention_mask.sum(1, keepdim=True)  # [B, M]
        return (share[:, None] @ tokens)[:, 0]  # [B, H]; the matrix product accumulates in fp32
