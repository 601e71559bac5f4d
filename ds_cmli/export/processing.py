"""Prepares pictures and texts for an exported model, with the same result to the bit as in training.

Shapes: I images, J texts, S image side in pixels, M text positions.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from ds_cmli.data.batch import PAD_MULTIPLE
from ds_cmli.data.pictures import load_image

# Further arguments that are accepted, with their accepted values.
ACCEPTED: dict[str, tuple[Any, ...]] = {
    "padding": (True, "longest", "max_length"),
    "truncation": (True, "longest_first"),
    "return_tensors": ("pt", None),
}


class CMLIProcessor(ProcessorMixin):
    """Combines a transformers tokenizer with the resizing and cropping of the training.

    Args:
        image_size: S; the shorter side is resized to it (bicubic), and the centre is cropped.
        context_length: the most tokens of a text, including special tokens; longer texts are truncated.
        pad_id: the padding token.
    """

    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer: Any = None, image_size: int = 224, context_length: int = 64, pad_id: int = 0):
        self.image_size, self.context_length, self.pad_id = image_size, context_length, pad_id
        super().__init__(tokenizer)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        """Prepare one or several pictures (PIL, or uint8 arrays [height, width, 3]), one or several texts, or both.

        Args:
            kwargs: the arguments that processors are usually called with, as far as `ACCEPTED` lists them.
                `padding="max_length"` pads texts to `context_length`; all others ask for what is done anyway.

        Returns:
            `pixel_values` uint8 [I, 3, S, S]; `input_ids` int64 and `attention_mask` bool [J, M].
        """
        for name, value in kwargs.items():
            if name not in ACCEPTED:
                known = ", ".join(["images", "text", *ACCEPTED])
                raise ValueError(f"{name}: this processor has no such argument; it takes {known}")
            if value not in ACCEPTED[name]:
                raise ValueError(f"{name} is {value!r}: give one of {', '.join(map(repr, ACCEPTED[name]))}")
        if images is None and text is None:
            raise ValueError("neither images nor text are given")
        out: dict[str, Any] = {}
        if images is not None:
            given = list(images) if isinstance(images, list | tuple) else [images]
            out["pixel_values"] = torch.stack([self.pixels(image) for image in given])
        if text is not None:
            out |= self.tokens([text] if isinstance(text, str) else list(text), kwargs.get("padding") == "max_length")
        return BatchFeature(out)

    def pixels(self, image: Any) -> torch.Tensor:
        """uint8 [3, S, S]."""
        if isinstance(image, np.ndarray) and image.dtype == np.uint8:
            image = Image.fromarray(image)
        if not isinstance(image, Image.Image):
            raise TypeError(f"an image is {type(image).__name__}: give a PIL image or a uint8 array [height, width, 3]")
        return load_image(image.copy(), self.image_size)

    def tokens(self, texts: list[str], whole: bool = False) -> dict[str, torch.Tensor]:
        """Texts padded to the longest one, rounded up to a multiple of 8, or with `whole` to `context_length`."""
        rows = self.tokenizer(texts, truncation=True, max_length=self.context_length)["input_ids"]
        longest = self.context_length if whole else max(len(row) for row in rows)
        length = min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, self.context_length)
        ids = torch.full((len(rows), length), self.pad_id)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for j, row in enumerate(rows):
            ids[j, : len(row)] = torch.tensor(row)
            mask[j, : len(row)] = True
        return {"input_ids": ids, "attention_mask": mask}

    @property
    def model_input_names(self) -> list[str]:
        return ["pixel_values", "input_ids", "attention_mask"]
