"""Prepares pictures and texts for an exported model, to the bit as in training.

Shapes: I images, J texts, S image side in pixels, M text positions.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

from ds_cmli.config.schema import Interpolation, Resize
from ds_cmli.data.batch import PAD_MULTIPLE
from ds_cmli.data.images import View
from ds_cmli.data.tokens import MOST_CHARACTERS

# Further arguments that are accepted, with their accepted values.
ACCEPTED: dict[str, tuple[object, ...]] = {
    "padding": (True, "longest", "max_length"),
    "truncation": (True, "longest_first"),
    "return_tensors": ("pt", "np", None),
}


class CMLIProcessor(ProcessorMixin):
    """Combines a transformers tokenizer with the resizing and cropping of the training.

    Args:
        image_size, resize, interpolation: S, and how a picture becomes S x S pixels, as the
            settings of `data` in training.
        context_length: the most tokens of a text, including special tokens; longer texts are
            truncated.
        pad_id: the padding token.
        padding: "longest", or "full": texts are padded to `context_length`, and the model attends
            to the padding.
    """

    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast | None = None,
        image_size: int = 224,
        context_length: int = 64,
        pad_id: int = 0,
        resize: Resize = "crop",
        interpolation: Interpolation = "bicubic",
        padding: str = "longest",
    ):
        self.image_size, self.resize, self.interpolation = image_size, resize, interpolation
        self.context_length, self.pad_id, self.padding = context_length, pad_id, padding
        if tokenizer is not None:
            tokenizer.truncation_side = "right"  # as in training, whatever it was made with
        super().__init__(tokenizer)

    def __call__(  # type: ignore[override]
        self, images: object = None, text: str | list[str] | None = None, **kwargs: object
    ) -> BatchFeature:
        """Prepare one or several pictures, one or several texts, or both.

        Args:
            images: what `data.images.View` takes, a list of such, or a batch of arrays or tensors.
            text: a string or a list of strings.
            kwargs: the arguments that processors are usually called with, as far as `ACCEPTED`
                lists them. `padding="max_length"` pads texts to `context_length`,
                `return_tensors="np"` asks for arrays; all others ask for what is done anyway.

        Returns:
            `pixel_values` uint8 [I, 3, S, S]; `input_ids` int64 and `attention_mask` bool [J, M].
            Tensors, or with `return_tensors="np"` arrays.

        Raises:
            TypeError, ValueError: an argument does not fit; one line says which and how.
        """
        _check_accepted(kwargs)
        if images is None and text is None:
            raise ValueError("neither images nor text are given")
        out: dict[str, Any] = {}
        if images is not None:
            view = View(self.image_size, self.resize, self.interpolation)
            out["pixel_values"] = torch.stack([view(one) for one in _listed("images", images)])
        if text is not None:
            out |= self.tokens(_listed("text", text), kwargs.get("padding") == "max_length")
        if kwargs.get("return_tensors") == "np":
            out = {name: value.numpy() for name, value in out.items()}
        return BatchFeature(out)

    def tokens(self, texts: list[str], whole: bool = False) -> dict[str, Tensor]:
        """Pad texts to the longest one, rounded up to a multiple of 8.

        With `whole`, they are padded to `context_length`.
        """
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(
                    f"a text is {type(text).__name__}: give a string or a list of strings"
                )
        texts = [text[:MOST_CHARACTERS] for text in texts]
        full = self.padding == "full"
        left = full and self.tokenizer.padding_side == "left"
        rows = self.tokenizer(
            texts, truncation=True, max_length=self.context_length, padding=left and "max_length"
        )["input_ids"]
        if not all(rows):
            raise ValueError(f"the text {texts[rows.index([])]!r} has no token: leave it out")
        longest = self.context_length if whole or full else max(map(len, rows))
        length = min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, self.context_length)
        ids = torch.full((len(rows), length), self.pad_id)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for j, row in enumerate(rows):
            ids[j, : len(row)] = torch.tensor(row)
            mask[j, : length if full else len(row)] = True
        return {"input_ids": ids, "attention_mask": mask}

    @property
    def model_input_names(self) -> list[str]:
        return ["pixel_values", "input_ids", "attention_mask"]


def _check_accepted(given: dict[str, object]) -> None:
    for name, value in given.items():
        if name not in ACCEPTED:
            known = ", ".join(["images", "text", *ACCEPTED])
            raise ValueError(f"{name}: this processor has no such argument; it takes {known}")
        if value not in ACCEPTED[name]:
            known = ", ".join(map(repr, ACCEPTED[name]))
            raise ValueError(f"{name} is {value!r}: give one of {known}")


def _listed(name: str, given: Any) -> list[Any]:
    """What was given for `name`, one or several, as a list. A batch of pictures is 4D."""
    several = isinstance(given, list | tuple) or getattr(given, "ndim", 0) == 4
    if several and not len(given):
        raise ValueError(f"{name} is empty: give at least one, or leave it out")
    return list(given) if several else [given]
