"""What an exported model is, as transformers keeps it in `config.json`."""

from typing import Any

from transformers import PreTrainedConfig


class CMLIConfig(PreTrainedConfig):
    """An image and a text encoder under shared blocks, their scores and temperatures.

    Args:
        settings: sections and settings of the run: `student`, with all sizes and no path, and of `data` what a picture
            and a text go through.
        losses: name and weight of each loss over pairs, in the run's order.
        vocab_size: rows of the table of token embeddings.
        pad_id: the token that texts are filled up with.
        class_first: texts begin with a class token.
        special_ids: tokens that count as no part of a text.
    """

    model_type = "ds_cmli"

    def __init__(
        self,
        settings: dict[str, Any] | None = None,
        losses: list[tuple[str, float]] | None = None,
        vocab_size: int = 0,
        pad_id: int = 0,
        class_first: bool = True,
        special_ids: list[int] | None = None,
        **kwargs: Any,
    ):
        self.settings = settings or {}
        self.losses = losses or []
        self.vocab_size = vocab_size
        self.pad_id = pad_id
        self.class_first = class_first
        self.special_ids = special_ids or []
        super().__init__(**kwargs)
