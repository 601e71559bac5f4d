"""What one tile adds to the gradient of one side: by gathering rows, or by a matrix product.

Shape legend: a tile is `rows` of `sequences` of its own side against `other_rows` of
`other_sequences`; `table` [other_rows, D] holds the other side's features. `won` [rows,
other_sequences] is the row of each other sequence at which an own row has its maximum, `lost`
[sequences, other_rows] the own row at which each other row has its maximum; both count back from
the last row of the sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.cmli.chunked.packed import Chunk, ChunkShape, PackedBatch, make_chunks

# Called with an own and an other chunk; returns the indices of both kinds, `won` and `lost`.
TileIndices = Callable[[Chunk, Chunk], tuple[Tensor, Tensor]]


class Tile(NamedTuple):
    own: PackedBatch
    other: PackedBatch
    own_chunk: Chunk
    other_chunk: Chunk
    grad_own: Tensor  # [own sequences, other sequences], of the score that is a mean over own rows
    grad_other: Tensor  # the same, over other rows

    def own_pairs(self) -> Tensor:
        """The weight of each own row's maximum [sequences, other_sequences], a wide copy."""
        return self._pairs(self.grad_own).mul_(self.own.scale[self.own_chunk.sequences(), None])

    def other_pairs(self) -> Tensor:
        """The weight of each other row's maximum [sequences, other_sequences]."""
        return self._pairs(self.grad_other).mul_(self.other.scale[self.other_chunk.sequences()])

    def _pairs(self, grad: Tensor) -> Tensor:
        own = self.own.order[self.own_chunk.sequences(), None]
        return grad[own, self.other.order[self.other_chunk.sequences()]].to(self.own.wide)


@dataclass
class Buffers:
    """Memory that all tiles of one side's gradient use one after the other."""

    total: Tensor  # [rows, D]
    row_numbers: Tensor  # int32 [rows]
    starts: Tensor  # int64 [rows]
    index: Tensor  # int32, one element per index of one kind in a tile, like the next four
    keys: Tensor  # int32
    order: Tensor  # int64
    weight: Tensor
    sorted_weight: Tensor
    panel: Tensor

    @classmethod
    def new(
        cls, rows: int, indices: int, features: Tensor, wide: torch.dtype, panel: int
    ) -> "Buffers":
        new = features.new_empty
        return cls(
            total=new((rows, features.shape[1]), dtype=wide),
            row_numbers=torch.arange(rows, dtype=torch.int32, device=features.device),
            starts=new(rows, dtype=torch.int64),
            index=new(indices, dtype=torch.int32),
            keys=new(indices, dtype=torch.int32),
            order=new(indices, dtype=torch.int64),
            weight=new(indices, dtype=wide),
            sorted_weight=new(indices, dtype=wide),
            panel=new(panel, dtype=wide),
        )


def add_won(tile: Tile, won: Tensor, table: Tensor, buffers: Buffers, sums: Tensor) -> None:
    """Add to `sums` [rows, D] the weighted rows of kind `won`, in the order in which they are
    stored."""
    _, other, own_chunk, other_chunk, *_ = tile
    rows = buffers.index[: won.numel()].view(won.shape).copy_(won)
    # [rows, other_sequences] -> row of `table`
    torch.sub(other.last[other_chunk.sequences()].sub(other_chunk.row), rows, out=rows)
    shares = buffers.weight[: won.numel()].view(won.shape)
    pairs = tile.own_pairs()
    for group in own_chunk.groups:
        group.by_sequence(shares, 0).copy_(pairs[group.sequences(), None])
    del pairs
    sums += F.embedding_bag(rows, table, per_sample_weights=shares, mode="sum")


def add_lost(tile: Tile, lost: Tensor, table: Tensor, buffers: Buffers, sums: Tensor) -> None:
    """Add to `sums` [rows, D] the weighted rows of kind `lost`, sorted by own row."""
    own, _, own_chunk, other_chunk, *_ = tile
    n = lost.numel()
    index, order, weight = buffers.index[:n], buffers.order[:n], buffers.weight[:n]
    keys, starts = buffers.keys[:n], buffers.starts[: own_chunk.height]
    key = index.view(lost.shape).copy_(lost)
    # [sequences, other_rows] -> own row
    torch.sub(own.last[own_chunk.sequences(), None].sub(own_chunk.row), key, out=key)
    shares = weight.view(lost.shape)
    pairs = tile.other_pairs()
    for group in other_chunk.groups:
        group.by_sequence(shares, 1).copy_(pairs[:, group.sequences(), None])
    del pairs
    torch.sort(index, stable=True, out=(keys, order))
    torch.searchsorted(keys, buffers.row_numbers[: own_chunk.height], out=starts)
    torch.index_select(weight, 0, order, out=buffers.sorted_weight[:n])
    rows = order.remainder_(other_chunk.height)
    shares = buffers.sorted_weight[:n]
    sums += F.embedding_bag(rows, table, starts, per_sample_weights=shares, mode="sum")


def add_product(
    tile: Tile,
    tile_indices: TileIndices,
    table: Tensor,
    most_rows: int,
    buffers: Buffers,
    sums: Tensor,
) -> None:
    """Add both kinds to `sums` [rows, D] by one product with `table`.

    Its other operand are the shares [rows, other_rows], zero but at argmax positions. That matrix
    is made in panels of `most_rows` own rows. No two indices of a kind share a place in it, so the
    first kind is written and the other, which may meet the first, added: in any order the same
    bits.
    """
    own, other, own_chunk, other_chunk, *_ = tile
    last_won = other.last[other_chunk.sequences()].to(torch.int64).sub_(other_chunk.row)
    last_lost = own.last[own_chunk.sequences()].to(torch.int64).sub_(own_chunk.row)
    own_pairs, other_pairs = tile.own_pairs(), tile.other_pairs()
    panel_shape = ChunkShape(most_rows, own_chunk.number, 0)
    stop = own_chunk.sequence + own_chunk.number
    for part in make_chunks(own.lengths, panel_shape, own_chunk.sequence, stop):
        won, lost = tile_indices(part, other_chunk)
        row = part.row - own_chunk.row
        flat = buffers.panel[: part.height * other_chunk.height]
        matrix = flat.view(part.height, other_chunk.height).zero_()
        # The buffers are shared: a kind's places are used before the other's are computed.
        # Writing runs on all threads, adding on one, so the kind with more indices is written.
        if won.numel() >= lost.numel():
            matrix.scatter_(1, *_place_won(won, own_pairs, last_won, tile, part, buffers))
            matrix.scatter_add_(0, *_place_lost(lost, other_pairs, last_lost, tile, part, buffers))
        else:
            matrix.scatter_(0, *_place_lost(lost, other_pairs, last_lost, tile, part, buffers))
            matrix.scatter_add_(1, *_place_won(won, own_pairs, last_won, tile, part, buffers))
        sums[row : row + part.height].addmm_(matrix, table)


def _place_won(
    won: Tensor, pairs: Tensor, last: Tensor, tile: Tile, part: Chunk, buffers: Buffers
) -> tuple[Tensor, Tensor]:
    """Columns and weights [rows, other_sequences] of a panel."""
    column = buffers.order[: won.numel()].view(won.shape).copy_(won)
    torch.sub(last, column, out=column)
    shares = buffers.weight[: won.numel()].view(won.shape)
    first = part.sequence - tile.own_chunk.sequence
    for group in part.groups:
        group.by_sequence(shares, 0).copy_(pairs[first:][group.sequences(), None])
    return column, shares


def _place_lost(
    lost: Tensor, pairs: Tensor, last: Tensor, tile: Tile, part: Chunk, buffers: Buffers
) -> tuple[Tensor, Tensor]:
    """Rows and weights [sequences, other_rows] of a panel."""
    first = part.sequence - tile.own_chunk.sequence
    sequences = slice(first, first + part.number)
    row = buffers.order[: lost.numel()].view(lost.shape).copy_(lost)
    torch.sub(last[sequences, None], row, out=row).sub_(part.row - tile.own_chunk.row)
    shares = buffers.weight[: lost.numel()].view(lost.shape)
    for group in tile.other_chunk.groups:
        group.by_sequence(shares, 1).copy_(pairs[sequences][:, group.sequences(), None])
    return row, shares
