"""One side of the score matrix, images or texts, without its padding: items sorted by length, valid rows only.

Both sides are treated alike. Sorted and compacted, a block of consecutive items is a matrix of valid rows only, in
which items of equal length lie side by side (a run): no padding is multiplied, and masks need no arithmetic.

Shape legend: B items, P positions of an item (padded), R valid rows of all items, D features.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """`count` items of equal `length`; where their items and rows begin in the block."""

    item: int
    row: int
    count: int
    length: int

    def items(self) -> slice:
        return slice(self.item, self.item + self.count)

    def rows(self) -> slice:
        return slice(self.row, self.row + self.count * self.length)


class Block(NamedTuple):
    """Consecutive items [item0, item1) of a side, in its sorted order, and their rows [row0, row1)."""

    item0: int
    item1: int
    row0: int
    row1: int
    runs: tuple[Run, ...]

    @property
    def count(self) -> int:
        return self.item1 - self.item0

    @property
    def height(self) -> int:
        return self.row1 - self.row0

    def items(self) -> slice:
        return slice(self.item0, self.item1)

    def rows(self) -> slice:
        return slice(self.row0, self.row1)


def make_blocks(lengths: list[int], max_rows: int, max_items: int) -> list[Block]:
    """Cut items of ascending `lengths` into blocks of at most `max_rows` rows and `max_items` items (one at least).

    Items of length 0, which come first, are in no block.
    """
    blocks: list[Block] = []
    item, row = lengths.count(0), 0
    while item < len(lengths):
        item0, row0, runs = item, row, list[Run]()
        while item < len(lengths) and item - item0 < max_items:
            length = lengths[item]
            if row - row0 + length > max_rows and item > item0:
                break
            if runs and runs[-1].length == length:
                runs[-1] = runs[-1]._replace(count=runs[-1].count + 1)
            else:
                runs.append(Run(item - item0, row - row0, 1, length))
            item, row = item + 1, row + length
        blocks.append(Block(item0, item, row0, row, tuple(runs)))
    return blocks


class Side:
    """The features of one side and the tables that find its valid rows.

    features [B, P, D], mask [B, P] bool or None (all valid), lengths: valid positions of each item, on the host.
    """

    def __init__(self, features: Tensor, mask: Tensor | None, lengths: list[int]):
        B, P, D = features.shape
        device = features.device
        self.features = features.reshape(B * P, D)
        self.dtype = torch.promote_types(features.dtype, torch.float32)
        order = sorted(range(B), key=lengths.__getitem__)  # stable
        self.lengths = [lengths[b] for b in order]
        self.order = torch.tensor(order, device=device)  # [B]
        counts = torch.tensor(self.lengths, device=device)  # [B]
        R = sum(lengths)
        self.scale = counts.clamp(min=1).reciprocal().to(self.dtype)  # [B] the mean's weight of each row
        self.last = counts.cumsum(0).sub_(1).to(torch.int32)  # [B] the row of each item's last valid position
        # [R] how far each row is from the last of its item.
        self.from_last = torch.repeat_interleave(self.last, counts, output_size=R).to(self.dtype)
        self.from_last -= torch.arange(R, device=device)
        if mask is None:
            self.source = None  # rows lie as they are
        else:
            valid = torch.nonzero_static(mask.index_select(0, self.order).flatten(), size=R)[:, 0]
            self.source = self.order[valid // P] * P + valid % P  # [R] where each row lies in `features`

    def blocks(self, max_rows: int, max_items: int) -> list[Block]:
        return make_blocks(self.lengths, max_rows, max_items)

    def load(self, block: Block, narrow: Tensor, wide: Tensor) -> Tensor:
        """The block's rows [height, D] in the dtype of the arithmetic, in the buffers given or as they lie."""
        if self.source is None:
            rows = self.features[block.rows()]
        elif self.features.dtype == self.dtype:
            return torch.index_select(self.features, 0, self.source[block.rows()], out=wide[: block.height])
        else:
            rows = torch.index_select(self.features, 0, self.source[block.rows()], out=narrow[: block.height])
        return rows if rows.dtype == self.dtype else wide[: block.height].copy_(rows)

    def store(self, block: Block, rows: Tensor, into: Tensor, add: bool) -> None:
        """Write (or add) the block's rows [height, D] to their places in `into` [B * P, D], cast to its dtype."""
        if self.source is None:
            target = into[block.rows()]
            target.add_(rows) if add else target.copy_(rows)
        elif add:
            into.index_add_(0, self.source[block.rows()], rows.to(into.dtype))
        else:
            into.index_copy_(0, self.source[block.rows()], rows.to(into.dtype))


def host_lengths(text_mask: Tensor, image_mask: Tensor | None) -> tuple[list[int], list[int] | None]:
    """Valid positions of every text and (None = all) image. The one CPU-GPU sync of forward, and of backward."""
    if image_mask is None:
        return text_mask.sum(1).tolist(), None
    J = text_mask.shape[0]
    both = torch.cat([text_mask.sum(1), image_mask.sum(1)]).tolist()
    return both[:J], both[J:]
