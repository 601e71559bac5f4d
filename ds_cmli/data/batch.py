"""One sample, a batch of samples, and the collate function between them.

B images with a text each, M text positions (padded), S image size in pixels.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from ds_cmli.common.probe import probe
from ds_cmli.common.trees import tree_map
from ds_cmli.data.aspect import Grid
from ds_cmli.data.bad import Bad
from ds_cmli.data.tokens import CaptionTokenizer, Tokens

NO_PICTURE = -1
# Padded captions are a multiple of this long: few different shapes, aligned for matrix products.
PAD_MULTIPLE = 8


def caption_id(input_ids: list[int]) -> int:
    """A hash of the caption's token ids, the same on all nodes, that fits int64."""
    digest = hashlib.blake2b(str(input_ids).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


@dataclass
class Sample:
    image: Tensor  # uint8 [3, S, S]; of any aspect, as `data.aspect.packed` has laid it out
    tokens: Tokens
    index: int  # the requested index, even if another sample replaces that one
    image_id: int  # identifies the picture shown: all captions of one picture have the same number
    token_picture: list[int] | None = None  # only for scenes (and phrases with boxes), see `Batch`
    cell_picture: list[int] | None = None  # only for scenes, see `Batch`
    bad: Bad | None = None  # the requested sample and why it could not be used
    grid: Grid | None = None  # of a picture of any aspect


@dataclass
class Batch:
    image: Tensor  # uint8 [B, 3, S, S]
    input_ids: Tensor  # int64 [B, M]
    attention_mask: Tensor  # bool [B, M], False for padding
    token_mask: Tensor  # bool [B, M], True for valid tokens (not [CLS], [SEP], [PAD])
    index: Tensor  # int64 [B], position in the data set
    pair_id: Tensor  # int64 [B, 2], hashes of picture and caption: equal for equal ones
    token_picture: Tensor  # int64 [B, M], which picture of the scene the token names, or -1
    cell_picture: Tensor  # int64 [B, 2, 2], which picture is in each quarter of the image, or -1
    bad: list[Bad]  # the samples that were replaced by others in this batch
    padded: bool  # whether `attention_mask` has any False, known without a CPU-GPU sync
    grid: Tensor | None = None  # int64 [B, 2], see `Sample`; None: the images are square

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        with probe.scope("data"):
            return tree_map(self, lambda tensor: probe.to_device(tensor, device, non_blocking))

    def pin_memory(self) -> "Batch":
        return tree_map(self, Tensor.pin_memory)


class Collate:
    """Makes a `Batch` of samples, with captions padded as the tokenizer says.

    To the longest, a multiple of `PAD_MULTIPLE` but at most the tokenizer's `positions`; or, of a
    `full` one, to `positions`, and then the padding is attended to.
    """

    def __init__(self, tokenizer: CaptionTokenizer):
        self.pad_id, self.positions = tokenizer.pad_id, tokenizer.positions
        self.full = tokenizer.full

    def __call__(self, samples: list[Sample]) -> Batch:
        def each(name: str) -> list:
            return list(map(attrgetter(name), samples))

        ids = each("tokens.input_ids")
        lengths = torch.tensor(list(map(len, ids)))
        if self.full:
            lengths = torch.full_like(lengths, self.positions)
        length = -(-int(lengths.max()) // PAD_MULTIPLE) * PAD_MULTIPLE
        length = min(length, self.positions)
        pictures = torch.tensor(each("image_id"))[:, None]  # [B, 1]
        caption_ids = torch.tensor(list(map(caption_id, ids)))
        return Batch(
            image=torch.stack(each("image")),
            input_ids=padded(ids, length, self.pad_id),
            attention_mask=torch.arange(length) < lengths[:, None],
            token_mask=padded(each("tokens.valid"), length, False),
            index=torch.tensor(each("index")),
            pair_id=torch.cat([pictures, caption_ids[:, None]], 1),
            token_picture=padded(each("token_picture"), length, NO_PICTURE),
            cell_picture=stack_cells(each("cell_picture")),
            bad=list(filter(None, each("bad"))),
            padded=int(lengths.min()) < length,
            grid=stack_grids(each("grid")),
        )


def padded(rows: Sequence[list | None], length: int, fill: int | bool) -> Tensor:
    """Stack lists, padded with `fill` to [B, length]: int64, or bool if `fill` is one."""
    out = torch.full((len(rows), length), fill)
    for row, values in zip(out, rows, strict=True):
        if values:
            row[: len(values)] = torch.tensor(values)
    return out


def stack_cells(cells: list[list[int] | None]) -> Tensor:
    """The pictures in B images' quarters, int64 [B, 2, 2]; `NO_PICTURE` if one is no scene."""
    return torch.tensor([cell or [NO_PICTURE] * 4 for cell in cells]).view(-1, 2, 2)


def stack_grids(grids: list[Grid | None]) -> Tensor | None:
    """int64 [B, 2], of black pictures one patch; None if none has a grid: then all are square."""
    if not any(grids):
        return None
    return torch.tensor([grid or (1, 1) for grid in grids])


def spans_of_tokens(tokens: Tokens, spans: Sequence[tuple[int, int]]) -> list[int]:
    """The number of the span in which each valid token ends, `NO_PICTURE` for the other tokens.

    A span is the index of its first character in the caption and one after its last.
    """
    pictures = [NO_PICTURE] * len(tokens.ends)
    for token, (end, valid) in enumerate(zip(tokens.ends, tokens.valid, strict=True)):
        for number, (first, stop) in enumerate(spans):
            if valid and first < end <= stop:
                pictures[token] = number
                break
    return pictures
