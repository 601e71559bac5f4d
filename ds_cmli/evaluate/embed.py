"""Embeddings of pictures and texts, which are computed once and kept in CPU memory.

Shapes: r pictures and t captions of this rank, B of them per batch, b of them in a block, N patches, M text positions,
T valid tokens of all t captions, H hidden size, D embedding dimension.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ds_cmli.cmli.contrastive import upcast
from ds_cmli.cmli.loss import l2_normalize
from ds_cmli.data.bad import Bad


@dataclass
class Images:
    """The embeddings of this rank's pictures; class tokens and patches have unit length."""

    number: Tensor  # int64 [r]
    cls: Tensor  # [r, H], fp32
    patches: Tensor  # [r, N, D], in the model's precision
    cell_picture: Tensor  # int64 [r, 2, 2], see `data.Batch`
    broken: dict[int, Bad] = field(
        default_factory=dict
    )  # by number, the pictures left out as they cannot be read

    def select(self, keep: Tensor) -> "Images":
        """The pictures that a mask, bool [r], selects."""
        return Images(
            self.number[keep], self.cls[keep], self.patches[keep], self.cell_picture[keep]
        )

    def block(self, rows: slice, device: Any) -> tuple[Tensor, Tensor]:
        """Class tokens [b, H] and patches [b, N, D] of some rows, on the device."""
        return self.cls[rows].to(device), self.patches[rows].to(device)


@dataclass
class Texts:
    """The embeddings of this rank's captions, of unit length; only valid tokens, caption after caption."""

    number: Tensor  # int64 [t]
    cls: Tensor  # [t, H], fp32
    tokens: Tensor  # [T, D], in the model's precision
    token_picture: Tensor  # int64 [T], see `data.Batch`
    length: Tensor  # int64 [t], number of valid tokens

    def __post_init__(self):
        self.ends = self.length.cumsum(0)  # [t], where each caption's tokens end

    def select(self, keep: Tensor) -> "Texts":
        """The captions that a mask, bool [t], selects."""
        tokens = keep.repeat_interleave(self.length)  # [T]
        kept = (
            self.number[keep],
            self.cls[keep],
            self.tokens[tokens],
            self.token_picture[tokens],
            self.length[keep],
        )
        return Texts(*kept)

    def tokens_of(self, row: int) -> slice:
        """The range of one caption's tokens in `tokens`."""
        end = int(self.ends[row])
        return slice(end - int(self.length[row]), end)

    def block(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Class tokens [b, H], padded tokens [b, M, D] and their mask, bool [b, M] (True = valid), of some rows."""
        tokens = pad_sequence(
            [self.tokens[self.tokens_of(int(row))] for row in rows], batch_first=True
        )
        mask = torch.arange(tokens.shape[1]) < self.length[rows][:, None]
        return self.cls[rows], tokens, mask


def image_embeddings(student: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Embed pictures, uint8 [B, 3, S, S] -> class tokens fp32 [B, H] and patches [B, N, D], of unit length."""
    cls, patches = student.encode_image(images)
    return upcast(l2_normalize(cls)), l2_normalize(student.projection(patches))


def text_embeddings(student: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Embed a `Batch` on the device -> class tokens fp32 [B, H] and tokens [B, M, D], of unit length."""
    cls, tokens = student.encode_text(batch.input_ids, batch.attention_mask)
    return upcast(l2_normalize(cls)), l2_normalize(student.projection(tokens))


def embed_images(
    student: Any, loader: Iterable, device: Any, heartbeat: Callable[[], None] = lambda: None
) -> Images:
    """Embed the pictures of a loader of `PictureBatch`es; fillers and broken pictures are encoded but left out.

    `heartbeat` is called for every batch and may be collective, as the loaders of all ranks have as many batches.
    """
    numbers, classes, patches, cells = [], [], [], []
    broken: dict[int, Bad] = {}
    for batch in loader:
        heartbeat()
        broken |= batch.broken
        cls, features = image_embeddings(student, batch.image.to(device, non_blocking=True))
        bad = torch.tensor(
            [number < 0 or number in batch.broken for number in batch.number.tolist()]
        )
        numbers.append(batch.number[~bad])
        classes.append(cls.cpu()[~bad])  # CPU-GPU sync
        patches.append(features.cpu()[~bad])
        cells.append(batch.cell_picture[~bad])
    return Images(
        torch.cat(numbers), torch.cat(classes), torch.cat(patches), torch.cat(cells), broken
    )


def embed_texts(
    student: Any, loader: Iterable, device: Any, heartbeat: Callable[[], None] = lambda: None
) -> tuple[Texts, list[int]]:
    """Embed the captions of a loader of `Batch`es; fillers and captions without a valid token are left out.

    Returns the embeddings and the numbers of the captions without a valid token. `heartbeat` as for `embed_images`.
    """
    numbers, classes, tokens, places, lengths, empty = [], [], [], [], [], []
    for batch in loader:
        heartbeat()
        cls, features = text_embeddings(student, batch.to(device, non_blocking=True))
        length = batch.token_mask.sum(1)  # [B]
        kept = (batch.index >= 0) & (length > 0)
        empty += batch.index[(batch.index >= 0) & (length == 0)].tolist()
        valid = batch.token_mask & kept[:, None]  # [B, M]
        numbers.append(batch.index[kept])
        classes.append(cls.cpu()[kept])  # CPU-GPU sync
        tokens.append(features.cpu()[valid])
        places.append(batch.token_picture[valid])
        lengths.append(length[kept])
    return Texts(*(torch.cat(x) for x in (numbers, classes, tokens, places, lengths))), empty


def pair_positions(images: Images, texts: Texts, image_of: Tensor) -> Iterator[tuple[int, int]]:
    """Yield (row in `images`, row in `texts`) of each caption whose picture is among the images."""
    place = {number: row for row, number in enumerate(images.number.tolist())}
    for row, caption in enumerate(texts.number.tolist()):
        picture = int(image_of[caption])
        if picture in place:
            yield place[picture], row
