"""Forward of the chunked backend: one matrix product per tile, from which both maxima are taken.

Shape legend: I images, J texts, N patches, M text positions, D features. A tile has T tokens of c
texts and K patches of i images.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ds_cmli.cmli.chunked.kernels import Kernels, kernels_for
from ds_cmli.cmli.chunked.packed import (
    ArgmaxIndices,
    Chunk,
    PackedBatch,
    largest,
    make_chunks,
    pack_both,
)
from ds_cmli.cmli.chunked.tiling import product, tile_sizes
from ds_cmli.cmli.inputs import Sides, index_dtype


class _Pass(NamedTuple):
    """Both sides, and what a pass over their tiles fills in; either of the two may be None."""

    texts: PackedBatch
    images: PackedBatch
    scores: tuple[Tensor, Tensor] | None  # [I, J] each
    indices: ArgmaxIndices | None
    one_way: bool  # what belongs to s_i2t is empty, and is not computed


def forward(
    sides: Sides, scratch_bytes: int, save_argmax: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute both scores [I, J] and the argmax indices.

    The indices are returned as `Sides.new_results` has them.
    """
    image, (I, J) = sides.image, sides.sizes()  # noqa: E741
    images, texts = pack_both(sides)
    N, M, D = images.positions, texts.positions, image.shape[-1]
    # Zeros, because the scores of empty sequences are never written.
    s_i2t, s_t2i, arg_i2t, arg_t2i = sides.new_results(save_argmax)
    indices = None
    if save_argmax:
        indices = ArgmaxIndices(arg_i2t.view(J, -1), arg_t2i.view(-1, I))
    kernels = kernels_for(texts, images, scratch_bytes, own=sides.own)
    if kernels is not None:
        kernels.compare((0, I), (s_i2t, s_t2i), indices)
        return s_i2t, s_t2i, arg_i2t, arg_t2i
    most_text, most_image = tile_sizes(N, M, D, image.dtype, scratch_bytes, backward=False)
    text_chunks = make_chunks(texts.lengths, most_text)
    image_chunks = make_chunks(images.lengths, most_image)
    wanted = _Pass(texts, images, (s_i2t, s_t2i), indices, sides.one_way)
    _compute_tiles(wanted, text_chunks, image_chunks)
    return s_i2t, s_t2i, arg_i2t, arg_t2i


def find_indices(
    texts: PackedBatch,
    images: PackedBatch,
    part: tuple[int, int],
    budget: int,
    kernels: Kernels | None,
    one_way: bool,
) -> ArgmaxIndices:
    """Find the indices of all texts and the images [first, stop) = `part` of the sorted order.

    Kernels find only those of pairs with a gradient, where these are few.
    """
    N, M = images.positions, texts.positions
    first, stop = part
    sequence = max(first, images.lengths.count(0))
    i2t = len(texts.lengths), sum(images.lengths[first:stop]) * (not one_way)
    t2i = sum(texts.lengths), stop - sequence
    indices = ArgmaxIndices(
        texts.features.new_empty(i2t, dtype=index_dtype(M)),
        texts.features.new_empty(t2i, dtype=index_dtype(N)),
        sequence,
        sum(images.lengths[:first]),
    )
    if kernels is not None:
        kernels.compare(part, indices=indices)
        return indices
    D, dtype = texts.features.shape[1], texts.features.dtype
    most_text, most_image = tile_sizes(N, M, D, dtype, budget, backward=False)
    text_chunks = make_chunks(texts.lengths, most_text)
    image_chunks = make_chunks(images.lengths, most_image, first, stop)
    _compute_tiles(_Pass(texts, images, None, indices, one_way), text_chunks, image_chunks)
    return indices


def _compute_tiles(wanted: _Pass, text_chunks: list[Chunk], image_chunks: list[Chunk]) -> None:
    """Fill in the scores and indices of all pairs of these chunks."""
    texts, images = wanted.texts, wanted.images
    text_buffers = texts.load_buffers(largest(text_chunks).rows)
    image_buffers = images.load_buffers(largest(image_chunks).rows)
    from_last = None
    if wanted.indices is not None:
        from_last = texts.from_last(), images.from_last()
    for image_chunk in image_chunks:
        V = images.load(image_chunk, image_buffers)  # [K, D]
        for text_chunk in text_chunks:
            W = texts.load(text_chunk, text_buffers)  # [T, D]
            _fill_tile(wanted, product(W, V), text_chunk, image_chunk, from_last)


def _fill_tile(
    wanted: _Pass,
    S: Tensor,
    text_chunk: Chunk,
    image_chunk: Chunk,
    from_last: tuple[Tensor, Tensor] | None,
) -> None:
    """Take the maxima of the similarities S [T, K], their means and their places."""
    # Of one direction, there are no groups over whose tokens maxima are taken.
    text_groups = () if wanted.one_way else text_chunk.groups
    texts = text_chunk.number * (not wanted.one_way)
    best_token = S.new_empty(texts, image_chunk.height)  # [c, K]
    for group in text_groups:
        torch.amax(group.by_sequence(S, 0), 1, out=best_token[group.sequences()])
    best_patch = S.new_empty(text_chunk.height, image_chunk.number)  # [T, i]
    for group in image_chunk.groups:
        torch.amax(group.by_sequence(S, 1), 2, out=best_patch[:, group.sequences()])
    if wanted.scores is not None:
        _write_means(wanted, best_token, best_patch, text_chunk, image_chunk)
    if wanted.indices is None or from_last is None:
        return
    # The first position equal to its maximum, three times faster than an argmax: equality as 0 or
    # 1, times the distance from the last position, is largest at the first. Everything in place,
    # S and the maxima included.
    if text_groups:
        equal = torch.empty_like(S)
        for group in text_groups:
            best = best_token[group.sequences(), None]
            torch.eq(group.by_sequence(S, 0), best, out=group.by_sequence(equal, 0))
        equal *= from_last[0][text_chunk.rows(), None]
        for group in text_groups:
            torch.amax(group.by_sequence(equal, 0), 1, out=best_token[group.sequences()])
        wanted.indices.of_patches(text_chunk, image_chunk).copy_(best_token)
    for group in image_chunk.groups:
        group.by_sequence(S, 1).eq_(best_patch[:, group.sequences(), None])
    S *= from_last[1][image_chunk.rows()]
    for group in image_chunk.groups:
        torch.amax(group.by_sequence(S, 1), 2, out=best_patch[:, group.sequences()])
    wanted.indices.of_tokens(text_chunk, image_chunk).copy_(best_patch)


def _write_means(
    wanted: _Pass,
    best_token: Tensor,
    best_patch: Tensor,
    text_chunk: Chunk,
    image_chunk: Chunk,
) -> None:
    """Write a tile's means of the maxima [c, K] over patches and [T, i] over tokens."""
    texts, images, scores = wanted.texts, wanted.images, wanted.scores
    assert scores is not None
    where = images.order[image_chunk.sequences(), None], texts.order[text_chunk.sequences()]
    mean = best_token.new_empty(text_chunk.number, image_chunk.number)  # [c, i]
    if not wanted.one_way:
        for group in image_chunk.groups:
            torch.sum(group.by_sequence(best_token, 1), 2, out=mean[:, group.sequences()])
        mean *= images.scale[image_chunk.sequences()]
        scores[0].index_put_(where, mean.t())
    for group in text_chunk.groups:
        torch.sum(group.by_sequence(best_patch, 0), 1, out=mean[group.sequences()])
    mean *= texts.scale[text_chunk.sequences(), None]
    scores[1].index_put_(where, mean.t())
