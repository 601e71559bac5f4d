"""Backward of the chunked backend. It reads only the argmax positions, and computes one gradient row after the other.

The gradient of a row (a patch or a token) is a weighted sum of rows of the other side, of two kinds. `won`: in every
sequence of the other side, the row that is most similar to this one. `lost`: every row of the other side to which this
row is the most similar one of its sequence. `embedding_bag` sums the first kind directly, and the second kind after a
stable sort by destination. For short texts the argmax positions are so dense that one product with the matrix of all
weights, which is zero elsewhere, is faster than both. All sums have a fixed order and use no atomics, so the same input
always gives the same bits.

Shape legend: I images, J texts, N patches, M text positions, D features. One side is `own`, the other `other`: a tile
is `rows` of `sequences` of the own side against `other_rows` of `other_sequences`.
"""

import torch
from torch import Tensor

from ds_cmli.cmli.check import index_dtype
from ds_cmli.cmli.chunked.forward import ArgmaxIndices, compute_tiles
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


def backward(
    grad_i2t: Tensor,
    grad_t2i: Tensor,
    image: Tensor,
    text: Tensor,
    token_mask: Tensor,
    image_mask: Tensor | None,
    arg_i2t: Tensor,
    arg_t2i: Tensor,
    scratch_bytes: int,
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of image and text in their dtype, summed in fp32 (fp64 for fp64). Empty indices are recomputed.

    Recomputed indices take up to half of `scratch_bytes`. If those of all images do not fit, the images are processed
    in several parts, and the text's gradient is summed over the parts. For 16-bit inputs that sum is an fp32 copy of
    the text's gradient, the only memory that does not count towards `scratch_bytes`.
    """
    (I, N, D), (J, M, _) = image.shape, text.shape  # noqa: E741
    images, texts = pack_both(image, text, token_mask, image_mask)
    d_image = _gradient_of(images, need_image)
    d_text = _gradient_of(texts, need_text)
    recompute = not arg_i2t.numel()
    plan = RecomputePlan(I, 1, scratch_bytes)
    if recompute:
        plan = RecomputePlan.of(I, N, J, sum(texts.lengths), M, scratch_bytes)
    most_text, most_image = tile_sizes(N, M, D, image.dtype, plan.budget, backward=True)
    text_chunks = make_chunks(texts.lengths, most_text)
    add = plan.number > 1
    text_total = d_text.to(texts.wide) if add else d_text

    for first in range(0, I, plan.images):
        stop = min(first + plan.images, I)
        image_chunks = make_chunks(images.lengths, most_image, first, stop)
        if not image_chunks or not text_chunks:
            continue
        if recompute:
            indices = _recompute(texts, images, first, stop, N, M, plan.budget)
        else:
            indices = ArgmaxIndices(arg_i2t.view(J, I * N), arg_t2i.view(J * M, I))
        if need_image:
            tile_indices = _image_indices(indices)
            _add_up(
                images,
                texts,
                image_chunks,
                text_chunks,
                grad_i2t,
                grad_t2i,
                tile_indices,
                plan.budget,
                d_image,
                False,
            )
        if need_text:
            tile_indices = _text_indices(indices)
            grads = grad_t2i.t(), grad_i2t.t()
            _add_up(
                texts,
                images,
                text_chunks,
                image_chunks,
                *grads,
                tile_indices,
                plan.budget,
                text_total,
                add,
            )
        del indices, tile_indices
    if text_total is not d_text:
        d_text.copy_(text_total)
    return d_image.view(image.shape) if need_image else d_image, d_text.view(
        text.shape
    ) if need_text else d_text


def _gradient_of(side: PackedBatch, needed: bool) -> Tensor:
    """Zeros [B * P, D], since padded rows get no gradient; an empty tensor if the gradient is not needed."""
    return torch.zeros_like(side.features) if needed else side.features.new_empty(0)


def _image_indices(indices: ArgmaxIndices) -> TileIndices:
    def tile_indices(image: Chunk, text: Chunk) -> tuple[Tensor, Tensor]:
        i2t, t2i = indices.tile(text, image)
        return i2t.t(), t2i.t()

    return tile_indices


def _text_indices(indices: ArgmaxIndices) -> TileIndices:
    def tile_indices(text: Chunk, image: Chunk) -> tuple[Tensor, Tensor]:
        i2t, t2i = indices.tile(text, image)
        return t2i, i2t

    return tile_indices


def _recompute(
    texts: PackedBatch, images: PackedBatch, first: int, stop: int, N: int, M: int, budget: int
) -> ArgmaxIndices:
    """The indices of all texts and the images [first, stop) of the sorted order."""
    D = texts.features.shape[1]
    most_text, most_image = tile_sizes(N, M, D, texts.features.dtype, budget, backward=False)
    image_chunks = make_chunks(images.lengths, most_image, first, stop)
    sequence, row = image_chunks[0].sequence, image_chunks[0].row
    new = texts.features.new_empty
    indices = ArgmaxIndices(
        new((len(texts.lengths), sum(images.lengths[first:stop])), dtype=index_dtype(M)),
        new((sum(texts.lengths), stop - sequence), dtype=index_dtype(N)),
        sequence,
        row,
    )
    compute_tiles(texts, images, make_chunks(texts.lengths, most_text), image_chunks, None, indices)
    return indices


def _add_up(
    own: PackedBatch,
    other: PackedBatch,
    own_chunks: list[Chunk],
    other_chunks: list[Chunk],
    grad_own: Tensor,
    grad_other: Tensor,
    tile_indices: TileIndices,
    budget: int,
    into: Tensor,
    add: bool,
) -> None:
    """Write the gradient of the own side's features to `into` [B * P, D], or add it if `add`.

    grad_own, grad_other: [own sequences, other sequences], the gradients of the score that averages over own rows and
    of the score that averages over other rows.
    """
    most, most_other = largest(own_chunks), largest(other_chunks)
    cpu, width = own.features.device.type == "cpu", Widths.of(own.wide)
    shapes = [
        (own_chunk.shape(), other_chunk.shape())
        for own_chunk in own_chunks
        for other_chunk in other_chunks
    ]
    panels = [
        panel_rows(*pair, budget, width) * pair[1].rows for pair in shapes if by_product(*pair, cpu)
    ]
    buffers = Buffers.new(most, most_other, own.features, own.wide, max(panels, default=0))
    load_buffers = other.load_buffers(most_other.rows)
    for own_chunk in own_chunks:
        sums = buffers.total[: own_chunk.height].zero_()
        for other_chunk in other_chunks:
            table = other.load(other_chunk, load_buffers)  # [other_rows, D]
            tile = Tile(own, other, own_chunk, other_chunk, grad_own, grad_other)
            if by_product(own_chunk.shape(), other_chunk.shape(), cpu):
                rows = panel_rows(own_chunk.shape(), other_chunk.shape(), budget, width)
                add_product(tile, tile_indices, table, rows, buffers, sums)
            else:
                won, lost = tile_indices(own_chunk, other_chunk)
                add_won(tile, won, table, buffers, sums)
                add_lost(tile, lost, table, buffers, sums)
        own.store(own_chunk, sums, into, add)
