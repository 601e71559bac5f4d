"""One sample, a batch of samples, and the collate function between them.

B images with a caption each, M text positions (padded), S image size in pixels.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ds_cmli import probe
from ds_cmli.data.tokens import CaptionTokenizer, Tokens

Bad = tuple[str, str]  # an image's name, and why it cannot be used
NO_PICTURE = -1
# Padded captions are a multiple of this long: few different shapes, aligned for matrix products.
PAD_MULTIPLE = 8


def hashed(*content: object) -> int:
    """A hash of the content that fits int64, the same on all nodes."""
    digest = hashlib.blake2b(" ".join(map(str, content)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


@dataclass
class Sample:
    image: Tensor  # uint8 [3, S, S]
    tokens: Tokens
    index: int  # the requested index, even if another sample replaces that one
    image_id: int  # identifies the image: all captions of one image have the same number
    # Of scenes: which picture each token names, and which is in each quarter of the image; or -1.
    token_picture: Sequence[int] = ()
    cell_picture: Sequence[int] = ()
    bad: Bad | None = None  # the requested sample and why it could not be used


@dataclass
class Batch:
    image: Tensor  # uint8 [B, 3, S, S]
    input_ids: Tensor  # int64 [B, M]
    attention_mask: Tensor  # bool [B, M], False for padding
    token_mask: Tensor  # bool [B, M], True for valid tokens (not [CLS], [SEP], [PAD])
    index: Tensor  # int64 [B], position in the data set
    pair_id: Tensor  # int64 [B, 2], hashes of the image and of its caption: equal for equal ones
    bad: list[Bad]  # the samples that were replaced by others in this batch
    padded: bool  # whether `attention_mask` has any False, known without a CPU-GPU sync

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        with probe.scope("data"):
            return self.map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        return self.map(Tensor.pin_memory)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Apply it to each tensor."""
        own = vars(self).items()
        changed: dict[str, Any] = {name: function(x) for name, x in own if isinstance(x, Tensor)}
        return replace(self, **changed)


class Collate:
    """Makes a `Batch` of samples, with captions padded as the tokenizer says.

    To the longest, a multiple of `PAD_MULTIPLE` but at most the tokenizer's `positions`; or, of a
    `full` one, to `positions`, and then the padding is attended to.
    """

    def __init__(self, tokenizer: CaptionTokenizer):
        self.pad_id, self.positions = tokenizer.pad_id, tokenizer.positions
        self.full = tokenizer.full

    def __call__(self, samples: list[Sample]) -> Batch:
        ids = [sample.tokens.input_ids for sample in samples]
        lengths = torch.tensor([self.positions if self.full else len(row) for row in ids])
        longest = -(-int(lengths.max()) // PAD_MULTIPLE) * PAD_MULTIPLE
        length = min(longest, self.positions)
        pair_ids = [(sample.image_id, hashed(sample.tokens.input_ids)) for sample in samples]
        return Batch(
            image=torch.stack([sample.image for sample in samples]),
            input_ids=padded(ids, length, self.pad_id),
            attention_mask=torch.arange(length) < lengths[:, None],
            token_mask=padded([sample.tokens.valid for sample in samples], length, False),
            index=torch.tensor([sample.index for sample in samples]),
            pair_id=torch.tensor(pair_ids),
            bad=[sample.bad for sample in samples if sample.bad],
            padded=int(lengths.min()) < length,
        )


def padded(rows: Sequence[Sequence], length: int, fill: int | bool) -> Tensor:
    """Stack rows, padded with `fill` to [B, length]: int64, or bool if `fill` is one."""
    out = torch.full((len(rows), length), fill)
    for row, values in zip(out, rows, strict=True):
        if values:
            row[: len(values)] = torch.tensor(values)
    return out
