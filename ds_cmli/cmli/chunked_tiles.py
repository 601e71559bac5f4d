"""A tile's share of one side's gradient, in two ways: by gathering rows, or by a matrix product.

Shape legend: a tile is `rows` of `items` of its own side against `other_rows` of `other_items`; `table` [other_rows, D]
are the other side's features. `won` [rows, other_items] says by which row of each other item an own row won, `lost`
[items, other_rows] which own row won by each other row; both count back from the last row of the item.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.cmli.ragged import Block, Extent, Side, make_blocks

# For an own and an other block: won and lost.
Codes = Callable[[Block, Block], tuple[Tensor, Tensor]]


class Tile(NamedTuple):
    own: Side
    other: Side
    ob: Block
    xb: Block
    grad_own: Tensor  # [own items, other items], of the score that is a mean over own rows
    grad_other: Tensor  # the same, over other rows

    def own_pairs(self) -> Tensor:
        """[items, other_items] what each own row's winner gets, a copy in the dtype of the arithmetic."""
        return self._pairs(self.grad_own).mul_(self.own.scale[self.ob.items(), None])

    def other_pairs(self) -> Tensor:
        """[items, other_items] what each other row's winner gets."""
        return self._pairs(self.grad_other).mul_(self.other.scale[self.xb.items()])

    def _pairs(self, grad: Tensor) -> Tensor:
        return grad[self.own.order[self.ob.items(), None], self.other.order[self.xb.items()]].to(self.own.wide)


@dataclass
class Buffers:
    """What all tiles of one side's gradient use in turn."""

    total: Tensor  # [rows, D]
    row_numbers: Tensor  # int32 [rows]
    starts: Tensor  # int64 [rows]
    index: Tensor  # int32, as many as a tile has winners of one kind; so are the next four
    keys: Tensor  # int32
    order: Tensor  # int64
    weight: Tensor
    sorted_weight: Tensor
    strip: Tensor

    @classmethod
    def new(cls, own: Extent, other: Extent, features: Tensor, wide: torch.dtype, strip: int) -> "Buffers":
        winners, new = max(own.rows * other.items, own.items * other.rows), features.new_empty
        return cls(
            new((own.rows, features.shape[1]), dtype=wide),
            torch.arange(own.rows, dtype=torch.int32, device=features.device),
            new(own.rows, dtype=torch.int64),
            new(winners, dtype=torch.int32),
            new(winners, dtype=torch.int32),
            new(winners, dtype=torch.int64),
            new(winners, dtype=wide),
            new(winners, dtype=wide),
            new(strip, dtype=wide),
        )


def add_won(tile: Tile, won: Tensor, table: Tensor, buffers: Buffers, sums: Tensor) -> None:
    """Add to `sums` [rows, D] the rows that the own rows won by, as they stand."""
    _, other, ob, xb, *_ = tile
    rows = buffers.index[: won.numel()].view(won.shape).copy_(won)
    torch.sub(other.last[xb.items()].sub(xb.row), rows, out=rows)  # [rows, other_items] of `table`
    shares = buffers.weight[: won.numel()].view(won.shape)
    pairs = tile.own_pairs()
    for run in ob.runs:
        run.by_item(shares, 0).copy_(pairs[run.items(), None])
    del pairs
    sums += F.embedding_bag(rows, table, per_sample_weights=shares, mode="sum")


def add_lost(tile: Tile, lost: Tensor, table: Tensor, buffers: Buffers, sums: Tensor) -> None:
    """Add to `sums` [rows, D] the other rows that the own rows won against, in the order of the own rows."""
    own, _, ob, xb, *_ = tile
    n = lost.numel()
    index, order, weight = buffers.index[:n], buffers.order[:n], buffers.weight[:n]
    keys, starts = buffers.keys[:n], buffers.starts[: ob.height]
    key = index.view(lost.shape).copy_(lost)
    torch.sub(own.last[ob.items(), None].sub(ob.row), key, out=key)  # [items, other_rows] -> own row
    shares = weight.view(lost.shape)
    pairs = tile.other_pairs()
    for run in xb.runs:
        run.by_item(shares, 1).copy_(pairs[:, run.items(), None])
    del pairs
    torch.sort(index, stable=True, out=(keys, order))
    torch.searchsorted(keys, buffers.row_numbers[: ob.height], out=starts)
    torch.index_select(weight, 0, order, out=buffers.sorted_weight[:n])
    rows = order.remainder_(xb.height)
    sums += F.embedding_bag(rows, table, starts, per_sample_weights=buffers.sorted_weight[:n], mode="sum")


def add_product(
    tile: Tile,
    codes: Codes,
    table: Tensor,
    most_rows: int,
    buffers: Buffers,
    sums: Tensor,
) -> None:
    """Add both to `sums` [rows, D]: shares [rows, other_rows], zero but for the winners, times `table`.

    In strips of `most_rows` own rows. No two winners of a kind share a place in
    the matrix, so the first kind is written and the other, which may meet the first, added: in any order the same bits.
    """
    own, other, ob, xb, *_ = tile
    won_by = tile.own_pairs(), other.last[xb.items()].to(torch.int64).sub_(xb.row)
    lost_to = tile.other_pairs(), own.last[ob.items()].to(torch.int64).sub_(ob.row)
    for part in make_blocks(own.lengths, Extent(most_rows, ob.number, 0), ob.item, ob.item + ob.number):
        won, lost = codes(part, xb)
        row = part.row - ob.row
        matrix = buffers.strip[: part.height * xb.height].view(part.height, xb.height).zero_()
        kinds = [(1, won, _place_won, won_by), (0, lost, _place_lost, lost_to)]
        kinds.sort(key=lambda kind: -kind[1].numel())  # writing runs on all threads, adding on one
        for scatter, (dim, winners, place, by) in zip((matrix.scatter_, matrix.scatter_add_), kinds, strict=True):
            scatter(dim, *place(winners, *by, tile, part, buffers))
        sums[row : row + part.height].addmm_(matrix, table)


def _place_won(
    won: Tensor, pairs: Tensor, last: Tensor, tile: Tile, part: Block, buffers: Buffers
) -> tuple[Tensor, Tensor]:
    """Columns and shares [rows, other_items] of a strip."""
    column = buffers.order[: won.numel()].view(won.shape).copy_(won)
    torch.sub(last, column, out=column)
    shares = buffers.weight[: won.numel()].view(won.shape)
    first = part.item - tile.ob.item
    for run in part.runs:
        run.by_item(shares, 0).copy_(pairs[first:][run.items(), None])
    return column, shares


def _place_lost(
    lost: Tensor, pairs: Tensor, last: Tensor, tile: Tile, part: Block, buffers: Buffers
) -> tuple[Tensor, Tensor]:
    """Rows and shares [items, other_rows] of a strip."""
    first = part.item - tile.ob.item
    items = slice(first, first + part.number)
    row = buffers.order[: lost.numel()].view(lost.shape).copy_(lost)
    torch.sub(last[items, None], row, out=row).sub_(part.row - tile.ob.row)
    shares = buffers.weight[: lost.numel()].view(lost.shape)
    for run in tile.xb.runs:
        run.by_item(shares, 1).copy_(pairs[items][:, run.items(), None])
    return row, shares
