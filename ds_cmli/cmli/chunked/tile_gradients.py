"""What one tile adds to the gradient of one side, by gathering rows.

Shape legend: a tile is `rows` of `sequences` of its own side against `other_rows` of
`other_sequences`; `table` [other_rows, D] holds the other side's features. `won` [rows,
other_sequences] is the row of each other sequence at which an own row has its maximum, `lost`
[sequences, other_rows] the own row at which each other row has its maximum; both count back from
the last row of the sequence.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.cmli.chunked.packed import Chunk, PackedBatch


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

    @classmethod
    def new(cls, rows: int, indices: int, features: Tensor, wide: torch.dtype) -> "Buffers":
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
