"""One side of the score matrix, images or texts, without its padding: items sorted by length, valid rows only.

Both sides are treated alike. A block of consecutive sorted items is a matrix of valid rows, in which items of equal
length lie side by side (a run): no padding is multiplied, and no mask is applied to a similarity.

Shape legend: B items, P positions of an item (padded), R valid rows of all items, D features.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """`number` items of equal `length` (at least 1), and where they begin in their block."""

    item: int
    row: int
    number: int
    length: int

    def items(self) -> slice:
        return slice(self.item, self.item + self.number)

    def by_item(self, rows: Tensor, dim: int) -> Tensor:
        """The run's part of `rows`, its dimension `dim` split in two: items and positions."""
        return rows.narrow(dim, self.row, self.number * self.length).unflatten(dim, (self.number, self.length))


class Extent(NamedTuple):
    """Size of a block, or most of each in several: rows, items, and rows of an item."""

    rows: int
    items: int
    longest: int


class Block(NamedTuple):
    """Consecutive items of a side in its sorted order, and their rows."""

    item: int
    number: int
    row: int
    height: int
    runs: tuple[Run, ...]

    def extent(self) -> Extent:
        return Extent(self.height, self.number, self.runs[-1].length)

    def items(self) -> slice:
        return slice(self.item, self.item + self.number)

    def rows(self) -> slice:
        return slice(self.row, self.row + self.height)


def make_blocks(lengths: list[int], most: Extent, start: int = 0, stop: int | None = None) -> list[Block]:
    """Cut items [start, stop) of ascending `lengths` into blocks of at most `most` rows and items (one item at least).

    Items of length 0 are in no block.
    """
    blocks: list[Block] = []
    item, row = start, sum(lengths[:start])
    stop = len(lengths) if stop is None else stop
    while item < stop and lengths[item] == 0:
        item += 1
    while item < stop:
        first, height, runs = item, 0, list[Run]()
        while item < stop and item - first < most.items and (item == first or height + lengths[item] <= most.rows):
            if runs and runs[-1].length == lengths[item]:
                runs[-1] = runs[-1]._replace(number=runs[-1].number + 1)
            else:
                runs.append(Run(item - first, height, 1, lengths[item]))
            height += lengths[item]
            item += 1
        blocks.append(Block(first, item - first, row, height, tuple(runs)))
        row += height
    return blocks


def largest(blocks: list[Block]) -> Extent:
    """Most of each in any block."""
    extents = [b.extent() for b in blocks] or [Extent(0, 0, 0)]
    return Extent(*(max(each) for each in zip(*extents, strict=True)))


class Side:
    """The features of one side and the tables that find its valid rows.

    features [B, P, D]; mask [B, P] bool or None (all valid); lengths: the valid positions of each item, on the host.
    """

    def __init__(self, features: Tensor, mask: Tensor | None, lengths: list[int]):
        B, P, D = features.shape
        device = features.device
        self.features = features.contiguous().view(B * P, D)  # gradients get its strides, as the op promises them
        self.wide = torch.promote_types(features.dtype, torch.float32)
        order = sorted(range(B), key=lengths.__getitem__)
        self.lengths = [lengths[b] for b in order]
        self.order = torch.tensor(order, device=device)  # [B]
        self.counts = torch.tensor(self.lengths, device=device)  # [B]
        self.scale = self.counts.clamp(min=1).to(self.wide).reciprocal_()  # [B] the weight of a row in its item's mean
        self.last = self.counts.cumsum(0).sub_(1).to(torch.int32)  # [B] row of each item's last valid position
        self.source = None  # [R] where each row lies in `features`; None: rows lie as they are
        if mask is not None:
            # nonzero_static instead of nonzero: the number is known, so the GPU need not tell it.
            valid = torch.nonzero_static(mask.index_select(0, self.order).flatten(), size=sum(lengths))[:, 0]
            self.source = self.order[valid // P].mul_(P).add_(valid.remainder_(P))

    def from_last(self) -> Tensor:
        """[R] how far each row is from the last of its item."""
        R = sum(self.lengths)
        rows = torch.repeat_interleave(self.last, self.counts, output_size=R).to(self.wide)
        return rows.sub_(torch.arange(R, device=rows.device))

    def load_buffers(self, rows: int) -> tuple[Tensor, Tensor]:
        """What `load` needs for blocks of so many rows: as they come, and widened."""
        D, same = self.features.shape[1], self.features.dtype == self.wide
        narrow = self.features.new_empty(0 if same or self.source is None else rows, D)
        return narrow, self.features.new_empty(0 if same and self.source is None else rows, D, dtype=self.wide)

    def load(self, block: Block, buffers: tuple[Tensor, Tensor]) -> Tensor:
        """The block's rows [height, D] in the dtype of the arithmetic."""
        narrow, wide = buffers
        if self.source is None:
            rows = self.features[block.rows()]
        else:
            out = narrow if narrow.shape[0] else wide
            rows = torch.index_select(self.features, 0, self.source[block.rows()], out=out[: block.height])
        return rows if rows.dtype == self.wide else wide[: block.height].copy_(rows)

    def store(self, block: Block, rows: Tensor, into: Tensor, add: bool) -> None:
        """Write, or add, the block's rows [height, D] to where they belong in `into` [B * P, D], in its dtype."""
        if self.source is None:
            target = into[block.rows()]
            target.add_(rows) if add else target.copy_(rows)
        else:
            source, rows = self.source[block.rows()], rows.to(into.dtype)
            into.index_add_(0, source, rows) if add else into.index_copy_(0, source, rows)


def make_sides(image: Tensor, text: Tensor, text_mask: Tensor, image_mask: Tensor | None) -> tuple[Side, Side]:
    """Images and texts. Lengths go to the host, the one time that a GPU is waited for in forward, and in backward."""
    (I, N, _), J = image.shape, text.shape[0]  # noqa: E741
    counts = text_mask.sum(1) if image_mask is None else torch.cat([text_mask.sum(1), image_mask.sum(1)])
    lengths = counts.tolist()  # CPU-GPU sync
    return Side(image, image_mask, lengths[J:] or [N] * I), Side(text, text_mask, lengths[:J])
