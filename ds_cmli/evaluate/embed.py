"""Embeddings of pictures and texts, which are computed once and kept in CPU memory.

Shapes: r pictures and t captions of this rank, B of them per batch, b of them in a block, N
patches, M text positions, T valid tokens of all t captions, H hidden size, D embedding dimension.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ds_cmli.common.errors import UserError
from ds_cmli.common.hardware import one_attention_on_all_gpus
from ds_cmli.data.batch import Bad, Batch, Collate, Sample
from ds_cmli.data.images import black
from ds_cmli.data.pairs import NO_TOKEN, batches, told
from ds_cmli.data.tokens import CaptionTokenizer
from ds_cmli.distributed import process_group as distributed
from ds_cmli.evaluate.held_out import FILLER, HeldOut, NumberedView, PictureBatch, collate_pictures

if TYPE_CHECKING:
    from ds_cmli.models.student import Student


@dataclass(frozen=True)
class EmbedSettings:
    """How pictures and captions are read and embedded.

    `heartbeat` is called for every batch and block, as often on every rank, for the detection of
    hangs; it may be collective.
    """

    batch_size: int
    device: torch.device
    workers: int = 0
    heartbeat: Callable[[], None] = lambda: None
    worker_init: Callable[[int], None] | None = None


@dataclass
class Images:
    """The embeddings of this rank's pictures; class tokens and patches have unit length."""

    number: Tensor  # int64 [r]
    cls: Tensor  # [r, H], fp32
    patches: Tensor  # [r, N, D], in the model's precision
    cell_picture: Tensor  # int64 [r, 2, 2], see `data.batch.Batch`
    grid: tuple[int, int]  # rows and columns of patches: N is their product
    # The pictures left out as they cannot be read, by number.
    broken: dict[int, Bad] = field(default_factory=dict)

    def select(self, keep: Tensor) -> "Images":
        """The pictures that a mask, bool [r], selects."""
        parts = self.number[keep], self.cls[keep], self.patches[keep], self.cell_picture[keep]
        return Images(*parts, self.grid)


@dataclass
class Texts:
    """The embeddings of this rank's captions, of unit length; only valid tokens, one by one."""

    number: Tensor  # int64 [t]
    cls: Tensor  # [t, H], fp32
    tokens: Tensor  # [T, D], in the model's precision
    token_picture: Tensor  # int64 [T], see `data.batch.Batch`
    length: Tensor  # int64 [t], number of valid tokens

    def __post_init__(self):
        self.ends = self.length.cumsum(0)  # [t], where each caption's tokens end

    def select(self, keep: Tensor) -> "Texts":
        """The captions that a mask, bool [t], selects."""
        tokens = keep.repeat_interleave(self.length)  # [T]
        return Texts(
            self.number[keep],
            self.cls[keep],
            self.tokens[tokens],
            self.token_picture[tokens],
            self.length[keep],
        )

    def tokens_of(self, row: int) -> slice:
        """The range of one caption's tokens in `tokens`."""
        end = int(self.ends[row])
        return slice(end - int(self.length[row]), end)

    def block(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Class tokens [b, H], padded tokens [b, M, D] and their mask, bool [b, M], of some rows.

        The mask is True for valid tokens.
        """
        tokens = pad_sequence(
            [self.tokens[self.tokens_of(row)] for row in rows.tolist()], batch_first=True
        )
        mask = torch.arange(tokens.shape[1]) < self.length[rows][:, None]
        return self.cls[rows], tokens, mask


def embed_images(student: "Student", loader: Iterable[PictureBatch], how: EmbedSettings) -> Images:
    """Embed the pictures of a loader; fillers and broken pictures are encoded but left out.

    The loaders of all ranks have as many batches.
    """
    numbers, classes, patches, cells = [], [], [], []
    broken: dict[int, Bad] = {}
    for batch in loader:
        how.heartbeat()
        broken |= batch.broken
        cls, features = student.image_embeddings(batch.image.to(how.device, non_blocking=True))
        usable = batch.usable()
        numbers.append(batch.number[usable])
        classes.append(cls.cpu()[usable])  # CPU-GPU sync
        patches.append(features.cpu()[usable])
        cells.append(batch.cell_picture[usable])
    parts = torch.cat(numbers), torch.cat(classes), torch.cat(patches), torch.cat(cells)
    return Images(*parts, student.grid, broken)


def embed_texts(
    student: "Student", loader: Iterable[Batch], how: EmbedSettings
) -> tuple[Texts, list[int]]:
    """Embed the captions of a loader; fillers and captions without a valid token are left out.

    Returns the embeddings and the numbers of the captions without a valid token. The loaders of all
    ranks have as many batches.
    """
    numbers, classes, tokens, places, lengths, empty = [], [], [], [], [], []
    for batch in loader:
        how.heartbeat()
        on_device = batch.to(how.device, non_blocking=True)
        cls, features = student.text_embeddings(on_device.input_ids, on_device.attention_mask)
        length = batch.token_mask.sum(1)  # [B]
        kept = (batch.index >= 0) & (length > 0)
        empty += batch.index[(batch.index >= 0) & (length == 0)].tolist()
        valid = batch.token_mask & kept[:, None]  # [B, M]
        numbers.append(batch.index[kept])
        classes.append(cls.cpu()[kept])  # CPU-GPU sync
        tokens.append(features.cpu()[valid])
        places.append(batch.token_picture[valid])
        lengths.append(length[kept])
    return Texts(*map(torch.cat, (numbers, classes, tokens, places, lengths))), empty


def embed_listed(
    student: "Student",
    tokenizer: CaptionTokenizer,
    texts: Sequence[str],
    numbers: Sequence[int],
    how: EmbedSettings,
) -> tuple[Texts, list[int]]:
    """What `embed_texts` returns, of the texts of these numbers in a list."""

    def sample(number: int) -> Sample:
        return Sample(black(0), tokenizer(texts[number]), number, image_id=0)

    view = NumberedView(sample, numbers)
    return embed_texts(student, batches(view, how.batch_size, 0, Collate(tokenizer)), how)


@dataclass
class Share:
    """The embeddings of a rank's share of the pictures and of their captions."""

    held_out: HeldOut
    images: Images
    texts: Texts
    captions: Tensor  # int64, the numbers of the usable captions of all ranks
    left_out: list[Bad]  # the samples of all ranks that cannot be used

    def pair_rows(self) -> Iterator[tuple[int, int]]:
        """Yield (row in `images`, row in `texts`) of each caption whose picture is in the share."""
        place = rows_of(self.images.number)
        for row, caption in enumerate(self.texts.number.tolist()):
            picture = int(self.held_out.image_of[caption])
            if picture in place:
                yield place[picture], row


def rows_of(numbers: Tensor) -> dict[int, int]:
    """The row of each picture or caption, by its number."""
    return {number: row for row, number in enumerate(numbers.tolist())}


def padded_share(count: int, rank: int, ranks: int) -> list[int]:
    """The numbers rank, rank + ranks, ... below `count`, with fillers to be as many as rank 0's."""
    share = list(range(rank, count, ranks))
    return share + [FILLER] * (-(-count // ranks) - len(share))


@torch.no_grad()
def embed_share(
    student: "Student", held_out: HeldOut, collate: Callable, how: EmbedSettings
) -> Share:
    """Embed every picture and every caption once, on one of the ranks. Collective.

    Raises:
        UserError: on every rank, if no pair can be used.
    """
    one_attention_on_all_gpus()  # as in training
    rank, ranks = distributed.rank(), distributed.world_size()
    image_of = held_out.image_of
    pictures = held_out.pictures(padded_share(held_out.images, rank, ranks))
    loader = batches(pictures, how.batch_size, how.workers, collate_pictures, how.worker_init)
    images = embed_images(student, loader, how)  # collective
    # A caption belongs to the rank of its picture.
    longest = int((image_of % ranks).bincount().max())
    numbers = (image_of % ranks == rank).nonzero().flatten().tolist()
    captions = held_out.captions(numbers + [FILLER] * (longest - len(numbers)))
    loader = batches(captions, how.batch_size, how.workers, collate, how.worker_init)
    texts, empty = embed_texts(student, loader, how)  # collective

    # Broken pictures with all of their captions, and captions without a token, cannot be used.
    broken: dict[int, Bad] = {}
    without: list[int] = []
    for share, others in distributed.gather_objects((images.broken, empty)):  # collective
        broken |= share
        without += others
    without.sort()
    keep = ~torch.isin(image_of, torch.tensor(sorted(broken), dtype=torch.int64))
    keep[without] = False
    left_out = [*held_out.at_load, *broken.values()]
    left_out += [(held_out.file(caption), NO_TOKEN) for caption in without]
    usable = keep.nonzero().flatten()
    if not len(usable):
        raise UserError(
            "no pair of the validation set can be used, for instance " + ", ".join(told(left_out))
        )
    shown = torch.isin(images.number, image_of[usable])
    images, texts = images.select(shown), texts.select(keep[texts.number])
    return Share(held_out, images, texts, usable, left_out)
