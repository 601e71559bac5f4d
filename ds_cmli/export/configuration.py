"""The configuration of an exported model, which transformers keeps in `config.json`."""

from typing import Any

from transformers import PreTrainedConfig


class CMLIConfig(PreTrainedConfig):
    """The sizes of the encoders and shared blocks, and which scores the model was trained with.

    Args:
        settings: two sections of the run's configuration: `student`, with all sizes and without
            paths, and those settings of `data` that say how pictures and texts are prepared.
        losses: name and weight of each loss over pairs, in the run's order.
        vocab_size: the number of rows of the token embedding table.
        pad_id: the padding token.
        class_first: whether texts begin with a class token.
        special_ids: the tokens that do not belong to a text itself.
        pad_ends_texts: whether the padding token is also the one with which a text ends, as in
            CLIP.
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
        pad_ends_texts: bool = False,
        **kwargs: Any,
    ):
        self.settings = settings or {}
        self.losses = losses or []
        self.vocab_size = vocab_size
        self.pad_id = pad_id
        self.class_first = class_first
        self.special_ids = special_ids or []
        self.pad_ends_texts = pad_ends_texts
        super().__init__(**kwargs)
