"""One sample, a batch of samples, and the collate function between them.

B pairs, M text positions (padded), S image size in pixels.
"""

import hashlib
from dataclasses import dataclass, fields

import torch

from ds_cmli.data.bad import Bad
from ds_cmli.data.tokens import CaptionTokenizer, Tokens

NO_PICTURE = -1
PAD_MULTIPLE = 8  # padded captions are a multiple of this long: few different shapes, aligned for matrix products


def caption_id(input_ids: list[int]) -> int:
    """A hash of the caption's token ids, the same on all nodes, that fits int64."""
    digest = hashlib.blake2b(str(input_ids).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


@dataclass
class Sample:
    image: torch.Tensor  # uint8 [3, S, S]
    tokens: Tokens
    index: int  # the requested index, even if another sample replaces that one
    image_id: int  # identifies the picture shown: all captions of one picture have the same number
    token_picture: list[int] | None = None  # only for scenes (and phrases with boxes), see `Batch`
    cell_picture: list[int] | None = None  # only for scenes, see `Batch`
    bad: Bad | None = None  # the requested sample and why it could not be used


@dataclass
class Batch:
    image: torch.Tensor  # uint8 [B, 3, S, S]
    input_ids: torch.Tensor  # int64 [B, M]
    attention_mask: torch.Tensor  # bool [B, M], False for padding
    token_mask: torch.Tensor  # bool [B, M], True for valid tokens (not [CLS], [SEP], [PAD])
    index: torch.Tensor  # int64 [B], position in the data set
    pair_id: (
        torch.Tensor
    )  # int64 [B, 2], hashes of picture and caption: equal for equal pictures or captions
    token_picture: (
        torch.Tensor
    )  # int64 [B, M], which picture of the scene the token names, -1 for none
    cell_picture: (
        torch.Tensor
    )  # int64 [B, 2, 2], which picture is in each quarter of the image, -1 for none
    bad: list[Bad]  # the samples that were replaced by others in this batch

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(
            **{k: function(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        )


class Collate:
    """Makes a `Batch` of samples, with captions padded to the longest.

    Their length is rounded up to a multiple of `PAD_MULTIPLE`, but is at most the tokenizer's `positions`.
    """

    def __init__(self, tokenizer: CaptionTokenizer):
        self.pad_id, self.positions = tokenizer.pad_id, tokenizer.positions

    def __call__(self, samples: list[Sample]) -> Batch:
        longest = max(len(sample.tokens.input_ids) for sample in samples)
        length = min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, self.positions)

        def padded(rows: list[list], fill, dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(
                [[*row, *[fill] * (length - len(row))] for row in rows], dtype=dtype
            )

        ids = [s.tokens.input_ids for s in samples]
        return Batch(
            image=torch.stack([s.image for s in samples]),
            input_ids=padded(ids, self.pad_id, torch.int64),
            attention_mask=padded([[True] * len(row) for row in ids], False, torch.bool),
            token_mask=padded([s.tokens.valid for s in samples], False, torch.bool),
            index=torch.tensor([s.index for s in samples]),
            pair_id=torch.tensor([[s.image_id, caption_id(s.tokens.input_ids)] for s in samples]),
            token_picture=padded([s.token_picture or [] for s in samples], NO_PICTURE, torch.int64),
            cell_picture=torch.tensor([s.cell_picture or [NO_PICTURE] * 4 for s in samples]).view(
                -1, 2, 2
            ),
            bad=[s.bad for s in samples if s.bad],
        )
