"""Backward of the chunked backend, which reads only the argmax positions: one gradient row at a
time.

The gradient of a row (a patch or a token) is a weighted sum of rows of the other side, of two
kinds. `won`: in every sequence of the other side, the row that is most similar to this one. `lost`:
every row of the other side to which this row is the most similar one of its sequence.
`embedding_bag` sums the first kind directly, and the second kind after a stable sort by
destination. For short texts the argmax positions are so dense that one product with the matrix of
all weights, which is zero elsewhere, is faster than both. Where most pairs have a gradient of
exactly 0, the others are computed alone (`kept.py`). All sums have a fixed order and use no
atomics, so the same input always gives the same bits.

Shape legend: I images, J texts, N patches, M text positions, D features. One side is `own`, the
other `other`: a tile is `rows` of `sequences` of the own side against `other_rows` of
`other_sequences`.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from ds_cmli.cmli.chunked.forward import ArgmaxIndices, Forward, compute_tiles
from ds_cmli.cmli.chunked.kept import KeptGradient, few_pairs, limits_of
from ds_cmli.cmli.chunked.packed import Chunk, PackedBatch, largest, make_chunks, pack_both
from ds_cmli.cmli.chunked.tile_gradients import (
    Buffers,
    Tile,
    TileIndices,
    add_lost,
    add_product,
    add_won,
)
from ds_cmli.cmli.chunked.tiling import RecomputePlan, Widths, by_product, panel_rows, tile_sizes
from ds_cmli.cmli.inputs import Sides, Wanted, index_dtype


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
    (I, N, D), (J, M, _) = sides.image.shape, sides.text.shape  # noqa: E741
    images, texts = pack_both(sides)
    d_image = _gradient_of(images, wanted.image)
    d_text = _gradient_of(texts, wanted.text)
    plan, saved = RecomputePlan(I, 1, scratch_bytes), None
    if argmax[0].numel():
        saved = ArgmaxIndices(argmax[0].view(J, I * N), argmax[1].view(J * M, I))
    else:
        plan = RecomputePlan.of(I, N, J, sum(texts.lengths), M, scratch_bytes)
    most_text, most_image = tile_sizes(N, M, D, images.features.dtype, plan.budget, backward=True)
    text_chunks = make_chunks(texts.lengths, most_text)
    chunks, limits = make_chunks(images.lengths, most_image), (0, 0, 0)
    if chunks and text_chunks and few_pairs(texts, images, grads, saved is not None):
        rows = largest(chunks).rows
        spare = _spare_bytes(sides, (images, texts), rows, saved is None, scratch_bytes)
        limits = limits_of(texts, images.lengths[-1], spare)
    add = plan.number > 1
    text_total = d_text.to(texts.wide) if add else d_text

    def add_part(first: int) -> None:
        """Add what the images from `first` on contribute; their indices are freed by the return."""
        stop = min(first + plan.images, I)
        image_chunks = make_chunks(images.lengths, most_image, first, stop)
        if not image_chunks or not text_chunks:
            return
        indices = saved or _recompute(texts, images, (first, stop), (N, M), plan.budget)
        if wanted.image:
            image_side = SideGradient(images, texts, image_chunks, text_chunks, grads)
            image_side.add_up(_tile_indices(indices, True), plan.budget, d_image, False)
        if wanted.text:
            turned = grads[1].t(), grads[0].t()
            text_side = SideGradient(texts, images, text_chunks, image_chunks, turned)
            text_side.add_up(_tile_indices(indices, False), plan.budget, text_total, add)

    if min(limits) > 0:
        KeptGradient(texts, images, grads, saved, limits).add_up(chunks, d_image, text_total)
    else:
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


def _spare_bytes(
    sides: Sides, both: tuple[PackedBatch, PackedBatch], rows: int, recompute: bool, limit: int
) -> int:
    """What the backward of all pairs takes, as predicted, beyond what that of kept ones holds."""
    from ds_cmli.cmli.peak_memory import cmli_peak_bytes  # which imports this package

    images, texts = both
    (I, N, D), (J, M, _) = sides.image.shape, sides.text.shape  # noqa: E741
    peak = cmli_peak_bytes(
        *(I, J, N, M, D, sides.image.dtype),
        recompute=recompute,
        scratch_bytes=limit,
        text_lengths=texts.lengths,
        image_lengths=None if images.source is None else images.lengths,
    )
    # Features and gradient of a chunk of images, and its masked features in 16 bit.
    held = 2 * rows * D * texts.wide.itemsize
    if images.source is not None and images.features.dtype != images.wide:
        held += rows * D * images.features.itemsize
    held += 28 * (I + J) + 8 * (I * N + J * M)  # the tables of both sides
    return peak.backward - peak.gradients - held


def _tile_indices(indices: ArgmaxIndices, of_image: bool) -> TileIndices:
    def tile_indices(own: Chunk, other: Chunk) -> tuple[Tensor, Tensor]:
        if of_image:
            i2t, t2i = indices.tile(other, own)
            return i2t.t(), t2i.t()
        i2t, t2i = indices.tile(own, other)
        return t2i, i2t

    return tile_indices


def _recompute(
    texts: PackedBatch,
    images: PackedBatch,
    part: tuple[int, int],
    longest: tuple[int, int],
    budget: int,
) -> ArgmaxIndices:
    """Find the indices of all texts and the images [first, stop) = `part` of the sorted order.

    longest: the padded lengths N and M.
    """
    (first, stop), (N, M) = part, longest
    D, dtype = texts.features.shape[1], texts.features.dtype
    most_text, most_image = tile_sizes(N, M, D, dtype, budget, backward=False)
    text_chunks = make_chunks(texts.lengths, most_text)
    image_chunks = make_chunks(images.lengths, most_image, first, stop)
    sequence, row = image_chunks[0].sequence, image_chunks[0].row
    i2t = len(texts.lengths), sum(images.lengths[first:stop])
    t2i = sum(texts.lengths), stop - sequence
    indices = ArgmaxIndices(
        texts.features.new_empty(i2t, dtype=index_dtype(M)),
        texts.features.new_empty(t2i, dtype=index_dtype(N)),
        sequence,
        row,
    )
    compute_tiles(Forward(texts, images, None, indices), text_chunks, image_chunks)
    return indices


@dataclass
class SideGradient:
    """The gradient of the own side's features.

    grads: [own sequences, other sequences], the gradients of the score that averages over own rows
        and of the score that averages over other rows.
    """

    own: PackedBatch
    other: PackedBatch
    own_chunks: list[Chunk]
    other_chunks: list[Chunk]
    grads: tuple[Tensor, Tensor]

    def add_up(self, tile_indices: TileIndices, budget: int, into: Tensor, add: bool) -> None:
        """Write the gradient to `into` [B * P, D], or add it if `add`."""
        own, other = self.own, self.other
        most, most_other = largest(self.own_chunks), largest(self.other_chunks)
        cpu, width = own.features.device.type == "cpu", Widths.of(own.wide)
        indices = max(most.rows * most_other.sequences, most.sequences * most_other.rows)
        panel = self.panel_elements(budget, width, cpu)
        buffers = Buffers.new(most.rows, indices, own.features, own.wide, panel)
        load_buffers = other.load_buffers(most_other.rows)
        for own_chunk in self.own_chunks:
            sums = buffers.total[: own_chunk.height].zero_()
            for other_chunk in self.other_chunks:
                tile = Tile(own, other, own_chunk, other_chunk, *self.grads)
                table = other.load(other_chunk, load_buffers)  # [other_rows, D]
                shapes = own_chunk.shape(), other_chunk.shape()
                if by_product(*shapes, cpu):
                    rows = panel_rows(*shapes, budget, width)
                    add_product(tile, tile_indices, table, rows, buffers, sums)
                else:
                    won, lost = tile_indices(own_chunk, other_chunk)
                    add_won(tile, won, table, buffers, sums)
                    add_lost(tile, lost, table, buffers, sums)
            own.store(own_chunk, sums, into, add)

    def panel_elements(self, budget: int, width: Widths, cpu: bool) -> int:
        """The elements of the largest panel that a tile needs; 0 where none takes a product."""
        shapes = product(map(Chunk.shape, self.own_chunks), map(Chunk.shape, self.other_chunks))
        taken = (pair for pair in shapes if by_product(*pair, cpu))
        return max((panel_rows(*pair, budget, width) * pair[1].rows for pair in taken), default=0)
