"""Backward of the chunked backend, which reads only the argmax positions: one gradient row at a
time.

The gradient of a row (a patch or a token) is a weighted sum of rows of the other side, of two
kinds. `won`: in every sequence of the other side, the row that is most similar to this one. `lost`:
every row of the other side to which this row is the most similar one of its sequence.
`embedding_bag` sums the first kind directly, and the second kind after a stable sort by
destination. All sums have a fixed order and use no atomics, so the same input always gives the same
bits. On a CPU compiled kernels do the same (`kernels.py`).

Shape legend: I images, J texts, N patches, M text positions, D features. One side is `own`, the
other `other`: a tile is `rows` of `sequences` of the own side against `other_rows` of
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

from ds_cmli.cmli.chunked.forward import find_indices
from ds_cmli.cmli.chunked.kernels import kernels_for
from ds_cmli.cmli.chunked.packed import (
    ArgmaxIndices,
    Chunk,
    PackedBatch,
    largest,
    make_chunks,
    pack_both,
)
from ds_cmli.cmli.chunked.tiling import RecomputePlan, tile_sizes
from ds_cmli.cmli.inputs import Sides, Wanted


def backward(
    sides: Sides,
    grads: tuple[Tensor, Tensor],
    argmax: tuple[Tensor, Tensor],
    wanted: Wanted,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of image and text in their dtype, summed in fp32 (fp64 for fp64).

    Empty indices are recomputed, and take up to half of `scratch_bytes`. If those of all images do
    not fit, the images are processed in several parts, and the text's gradient is summed over the
    parts. For 16-bit inputs that sum is an fp32 copy of the text's gradient, the only memory that
    does not count towards `scratch_bytes`.

    Args:
        grads: of both scores, [I, J] each.
        argmax: the indices that `forward` has saved.
    """
    I, J = sides.sizes()  # noqa: E741
    images, texts = pack_both(sides)
    N, M, D = images.positions, texts.positions, sides.image.shape[-1]
    d_image = _gradient_of(images, wanted.image)
    d_text = _gradient_of(texts, wanted.text)
    plan, saved = RecomputePlan(I, 1, scratch_bytes), None
    if argmax[1].numel():
        saved = ArgmaxIndices(argmax[0].view(J, -1), argmax[1].view(-1, I))
    else:
        texts_of_patches = J * (not sides.one_way)
        plan = RecomputePlan.of(I, N, texts_of_patches, sum(texts.lengths), M, scratch_bytes)
    kernels = kernels_for(texts, images, plan.budget, grads, sides.own)
    most_text, most_image = tile_sizes(N, M, D, images.features.dtype, plan.budget, backward=True)
    add = plan.number > 1
    text_total = d_text.to(texts.wide) if add else d_text

    def add_part(first: int) -> None:
        """Add what the images from `first` on contribute; their indices are freed by the return."""
        part = first, min(first + plan.images, I)
        if not images.lengths[part[1] - 1] or not texts.lengths[-1]:
            return  # all are empty
        indices = saved or find_indices(texts, images, part, plan.budget, kernels, sides.one_way)
        if kernels is not None:
            kernels.add_gradients(part, indices, d_image, text_total)
            return
        image_chunks = make_chunks(images.lengths, most_image, *part)
        text_chunks = make_chunks(texts.lengths, most_text)
        if wanted.image:
            chunks = image_chunks, text_chunks
            SideGradient(images, texts, *chunks, grads, indices, True).add_up(d_image, False)
        if wanted.text:
            chunks, turned = (text_chunks, image_chunks), (grads[1].t(), grads[0].t())
            SideGradient(texts, images, *chunks, turned, indices, False).add_up(text_total, add)

    for first in range(0, I, plan.images):
        add_part(first)
    if text_total is not d_text:
        d_text.copy_(text_total)
    if wanted.image:
        d_image = d_image.view(sides.image.shape)
    if wanted.text:
        d_text = d_text.view(sides.text.shape)
    return d_image, d_text


def _gradient_of(side: PackedBatch, wanted: bool) -> Tensor:
    """Zeros [B * P, D], since padded rows get no gradient; an empty tensor if it is not wanted."""
    if wanted:
        return torch.zeros_like(side.features)
    return side.features.new_empty(0)


@dataclass
class SideGradient:
    """The gradient of the own side's features.

    grads: [own sequences, other sequences], the gradients of the score that averages over own rows
        and of the score that averages over other rows.
    of_image: whether the own side is that of the images.
    """

    own: PackedBatch
    other: PackedBatch
    own_chunks: list[Chunk]
    other_chunks: list[Chunk]
    grads: tuple[Tensor, Tensor]
    indices: ArgmaxIndices
    of_image: bool

    def add_up(self, into: Tensor, add: bool) -> None:
        """Write the gradient to `into` [B * P, D], or add it if `add`."""
        own, other = self.own, self.other
        most, most_other = largest(self.own_chunks), largest(self.other_chunks)
        one_way = not self.indices.arg_i2t.numel()
        won = most.rows * most_other.sequences * (not (one_way and self.of_image))
        lost = most.sequences * most_other.rows * (self.of_image or not one_way)
        indices = max(won, lost)
        buffers = Buffers.new(most.rows, indices, own.features, own.wide)
        load_buffers = other.load_buffers(most_other.rows)
        for own_chunk in self.own_chunks:
            sums = buffers.total[: own_chunk.height].zero_()
            for other_chunk in self.other_chunks:
                tile = BackwardTile(own, other, own_chunk, other_chunk, *self.grads)
                table = other.load(other_chunk, load_buffers)  # [other_rows, D]
                if won:
                    add_won(tile, self._won(own_chunk, other_chunk), table, buffers, sums)
                if lost:
                    add_lost(tile, self._lost(own_chunk, other_chunk), table, buffers, sums)
            own.store(own_chunk, sums, into, add)

    def _won(self, own: Chunk, other: Chunk) -> Tensor:
        if self.of_image:
            return self.indices.of_patches(other, own).t()
        return self.indices.of_tokens(own, other)

    def _lost(self, own: Chunk, other: Chunk) -> Tensor:
        if self.of_image:
            return self.indices.of_tokens(other, own).t()
        return self.indices.of_patches(own, other)


class BackwardTile(NamedTuple):
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


def add_won(tile: BackwardTile, won: Tensor, table: Tensor, buffers: Buffers, sums: Tensor) -> None:
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


def add_lost(
    tile: BackwardTile, lost: Tensor, table: Tensor, buffers: Buffers, sums: Tensor
) -> None:
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
