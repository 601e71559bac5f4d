"""One side of the score matrix without its padding: sequences sorted by length, valid rows only.

Images and texts are handled in the same way. A chunk holds consecutive sequences of the sorted
order as one matrix of valid rows. Sequences of equal length are neighbours in it and form a group,
which can be viewed as [sequences, positions, ...]. No padding is multiplied, and no similarity has
to be masked.

Shape legend: B sequences, P positions of a sequence (padded), R valid rows of all sequences,
D features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ds_cmli.cmli.inputs import Sides
from ds_cmli.cmli.without_data import assumed


class Group(NamedTuple):
    """`number` sequences of equal `length` (at least 1), and where they begin in their chunk."""

    sequence: int
    row: int
    number: int
    length: int

    def sequences(self) -> slice:
        return slice(self.sequence, self.sequence + self.number)

    def by_sequence(self, rows: Tensor, dim: int) -> Tensor:
        """The group's part of `rows`, its dimension `dim` split in two: sequences and positions."""
        part = rows.narrow(dim, self.row, self.number * self.length)
        return part.unflatten(dim, (self.number, self.length))


class ChunkShape(NamedTuple):
    """Size of a chunk, or the largest of each size among several chunks."""

    rows: int
    sequences: int
    longest: int  # rows of the longest sequence


class Chunk(NamedTuple):
    """Consecutive sequences of a side in its sorted order, and their rows."""

    sequence: int
    number: int
    row: int
    height: int
    groups: tuple[Group, ...]

    def shape(self) -> ChunkShape:
        return ChunkShape(self.height, self.number, self.groups[-1].length)

    def sequences(self) -> slice:
        return slice(self.sequence, self.sequence + self.number)

    def rows(self) -> slice:
        return slice(self.row, self.row + self.height)


def make_chunks(
    lengths: list[int], most: ChunkShape, start: int = 0, stop: int | None = None
) -> list[Chunk]:
    """Split the sequences [start, stop) of ascending `lengths` into chunks.

    A chunk has at most the rows and sequences of `most`, but one sequence at least. Sequences of
    length 0 are in no chunk.
    """
    known, chunks = assumed(), list[Chunk]()
    sequence, row = start, sum(lengths[:start])
    stop = len(lengths) if stop is None else stop
    if known is not None and known.any_lengths:
        number, height = min(most.sequences, stop - start), min(most.rows, sum(lengths[start:stop]))
        return [Chunk(start, number, row, height, (Group(0, 0, 1, min(most.longest, height)),))]
    while sequence < stop and lengths[sequence] == 0:
        sequence += 1
    while sequence < stop:
        first, height, groups = sequence, 0, list[Group]()
        while (
            sequence < stop
            and sequence - first < most.sequences
            and (sequence == first or height + lengths[sequence] <= most.rows)
        ):
            if groups and groups[-1].length == lengths[sequence]:
                groups[-1] = groups[-1]._replace(number=groups[-1].number + 1)
            else:
                groups.append(Group(sequence - first, height, 1, lengths[sequence]))
            height += lengths[sequence]
            sequence += 1
        chunks.append(Chunk(first, sequence - first, row, height, tuple(groups)))
        row += height
    if known is not None:  # those of equal sizes allocate the same
        return list({chunk.shape(): chunk for chunk in chunks}.values())
    return chunks


def largest(chunks: list[Chunk]) -> ChunkShape:
    """The largest of each size among the chunks; zeros for no chunk."""
    most = ChunkShape(0, 0, 0)
    for chunk in chunks:
        most = ChunkShape(*map(max, most, chunk.shape()))
    return most


class PackedBatch:
    """The features of one side and the tables that find its valid rows.

    Args:
        features: [B, P, D].
        mask: [B, P] bool; None = all valid.
        lengths: the valid positions of each sequence, on the host.
    """

    def __init__(self, features: Tensor, mask: Tensor | None, lengths: list[int]):
        (B, P, _), device = features.shape, features.device
        # Gradients get the strides of this, as the op promises them.
        self.features, self.positions = features.contiguous().flatten(0, -2), P
        self.wide = torch.promote_types(features.dtype, torch.float32)
        order = sorted(range(B), key=lengths.__getitem__)
        self.lengths = [lengths[b] for b in order]
        self.order = torch.tensor(order, device=device)  # [B]
        self.counts = torch.tensor(self.lengths, device=device)  # [B]
        # [B] weight of a row in the mean
        self.scale = self.counts.clamp(min=1).to(self.wide).reciprocal_()
        # [B] row of each sequence's last valid position
        self.last = self.counts.cumsum(0).sub_(1).to(torch.int32)
        # [R] each valid row's place in `features`; None if all rows are valid and in order
        self.source = None
        if mask is not None:
            sorted_mask = mask.index_select(0, self.order).flatten()
            # nonzero_static instead of nonzero: the number is known, which avoids a CPU-GPU sync.
            valid = torch.nonzero_static(sorted_mask, size=sum(lengths))[:, 0]
            self.source = self.order[valid // P].mul_(P).add_(valid.remainder_(P))

    def from_last(self) -> Tensor:
        """[R] each row's distance from the last row of its sequence."""
        R = sum(self.lengths)
        rows = torch.repeat_interleave(self.last, self.counts, output_size=R).to(self.wide)
        return rows.sub_(torch.arange(R, device=rows.device))

    def load_buffers(self, rows: int) -> tuple[Tensor, Tensor]:
        """Buffers for `load` of up to `rows` rows, in the features' dtype and in the wide one."""
        D, same = self.features.shape[1], self.features.dtype == self.wide
        narrow_rows = 0 if same or self.source is None else rows
        wide_rows = 0 if same and self.source is None else rows
        narrow = self.features.new_empty(narrow_rows, D)
        return narrow, self.features.new_empty(wide_rows, D, dtype=self.wide)

    def load(self, chunk: Chunk, buffers: tuple[Tensor, Tensor]) -> Tensor:
        """The chunk's rows [height, D] in the dtype of the arithmetic."""
        narrow, wide = buffers
        if self.source is None:
            rows = self.features[chunk.rows()]
        else:
            out = (narrow if narrow.shape[0] else wide)[: chunk.height]
            rows = torch.index_select(self.features, 0, self.source[chunk.rows()], out=out)
        if rows.dtype == self.wide:
            return rows
        return wide[: chunk.height].copy_(rows)

    def store(self, chunk: Chunk, rows: Tensor, into: Tensor, add: bool) -> None:
        """Write the chunk's rows [height, D] to their places in `into` [B * P, D], or add them."""
        if self.source is None:
            target = into[chunk.rows()]
            write_rows = target.add_ if add else target.copy_
            write_rows(rows)
        else:
            write_places = into.index_add_ if add else into.index_copy_
            write_places(0, self.source[chunk.rows()], rows.to(into.dtype))


class ArgmaxIndices(NamedTuple):
    """Argmax indices of all texts and of the images from number `sequence` on.

    Of one direction, `arg_i2t` is empty.

    The first of these images begins at `row`. The package's docstring describes the layout.
    """

    arg_i2t: Tensor  # [J, K]
    arg_t2i: Tensor  # [T, I]
    sequence: int = 0
    row: int = 0

    def of_patches(self, text: Chunk, image: Chunk) -> Tensor:
        """The best tokens in one tile, a view [c, K]."""
        return self.arg_i2t[text.sequences()].narrow(1, image.row - self.row, image.height)

    def of_tokens(self, text: Chunk, image: Chunk) -> Tensor:
        """The best patches in one tile, a view [T, i]."""
        first = image.sequence - self.sequence
        return self.arg_t2i[text.rows()].narrow(1, first, image.number)


def pack_both(sides: Sides) -> tuple[PackedBatch, PackedBatch]:
    """Pack images and texts.

    Lengths go to the host, the one time that a GPU is waited for in forward, and in backward.
    """
    I, J = sides.sizes()  # noqa: E741
    counts = sides.token_mask.sum(1)
    if sides.image_mask is not None:
        counts = torch.cat([counts, sides.image_mask.sum(1)])
    known = assumed()
    lengths = counts.tolist() if known is None else known.lengths  # CPU-GPU sync
    images = PackedBatch(sides.image, sides.image_mask, lengths[J:] or [sides.image.shape[-2]] * I)
    return images, PackedBatch(sides.text, sides.token_mask, lengths[:J])
