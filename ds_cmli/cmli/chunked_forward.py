"""Forward of the chunked backend: one matrix product a tile, and both maxima from it.

Shape legend: I images, J texts, N patches, M text positions, D features; T tokens of c texts and K patches of i
images in a tile.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ds_cmli.cmli.check import winner_dtype
from ds_cmli.cmli.product import product
from ds_cmli.cmli.ragged import Block, Side, largest, make_blocks, make_sides
from ds_cmli.cmli.tiling import tile_sizes


class Winners(NamedTuple):
    """Winners of all texts and of the images from `item` on, whose rows begin at `row`; see `chunked`."""

    code_i2t: Tensor  # [J, K]
    code_t2i: Tensor  # [T, I]
    item: int = 0
    row: int = 0

    def tile(self, text: Block, image: Block) -> tuple[Tensor, Tensor]:
        """[c, K] and [T, i]"""
        i2t = self.code_i2t[text.items()].narrow(1, image.row - self.row, image.height)
        return i2t, self.code_t2i[text.rows()].narrow(1, image.item - self.item, image.number)


def forward(
    image: Tensor, text: Tensor, text_mask: Tensor, image_mask: Tensor | None, scratch_bytes: int, save_argmax: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both scores [I, J], and the winners in memory of shape [I, J, N] and [I, J, M] (empty unless `save_argmax`)."""
    (I, N, D), (J, M, _) = image.shape, text.shape  # noqa: E741
    images, texts = make_sides(image, text, text_mask, image_mask)
    s_i2t, s_t2i = (image.new_zeros((I, J), dtype=images.wide) for _ in range(2))
    # Zeros, as what belongs to empty items is never written: the same bits every time.
    arg_i2t = image.new_zeros((I, J, N) if save_argmax else (0,), dtype=winner_dtype(M))
    arg_t2i = image.new_zeros((I, J, M) if save_argmax else (0,), dtype=winner_dtype(N))
    winners = Winners(arg_i2t.view(J, I * N), arg_t2i.view(J * M, I)) if save_argmax else None
    most_text, most_image = tile_sizes(N, M, D, image.dtype, scratch_bytes, backward=False)
    blocks = make_blocks(texts.lengths, most_text), make_blocks(images.lengths, most_image)
    run_tiles(texts, images, *blocks, (s_i2t, s_t2i), winners)
    return s_i2t, s_t2i, arg_i2t, arg_t2i


def run_tiles(
    texts: Side,
    images: Side,
    text_blocks: list[Block],
    image_blocks: list[Block],
    scores: tuple[Tensor, Tensor] | None,
    winners: Winners | None,
) -> None:
    """Fill in the scores and the winners, whichever are wanted, for all pairs of these blocks."""
    text_buffers = texts.load_buffers(largest(text_blocks).rows)
    image_buffers = images.load_buffers(largest(image_blocks).rows)
    from_last = (texts.from_last(), images.from_last()) if winners is not None else None
    for ib in image_blocks:
        V = images.load(ib, image_buffers)  # [K, D]
        for tb in text_blocks:
            W = texts.load(tb, text_buffers)  # [T, D]
            _tile(V, W, texts, images, tb, ib, scores, winners, from_last)


def _tile(
    V: Tensor,
    W: Tensor,
    texts: Side,
    images: Side,
    tb: Block,
    ib: Block,
    scores: tuple[Tensor, Tensor] | None,
    winners: Winners | None,
    from_last: tuple[Tensor, Tensor] | None,
) -> None:
    S = product(W, V)  # [T, K]
    best_token = S.new_empty(tb.number, ib.height)  # [c, K]
    for run in tb.runs:
        torch.amax(run.by_item(S, 0), 1, out=best_token[run.items()])
    best_patch = S.new_empty(tb.height, ib.number)  # [T, i]
    for run in ib.runs:
        torch.amax(run.by_item(S, 1), 2, out=best_patch[:, run.items()])
    if scores is not None:
        where = (images.order[ib.items(), None], texts.order[tb.items()])
        mean = S.new_empty(tb.number, ib.number)  # [c, i]
        for run in ib.runs:
            torch.sum(run.by_item(best_token, 1), 2, out=mean[:, run.items()])
        mean *= images.scale[ib.items()]
        scores[0].index_put_(where, mean.t())
        for run in tb.runs:
            torch.sum(run.by_item(best_patch, 0), 1, out=mean[run.items()])
        mean *= texts.scale[tb.items(), None]
        scores[1].index_put_(where, mean.t())
        del mean
    if winners is None or from_last is None:
        return
    # The first position equal to its maximum, three times faster than an argmax: equality as 0 or 1, times the
    # distance from the last position, is largest at the first. Everything in place, S and the maxima included.
    code_i2t, code_t2i = winners.tile(tb, ib)
    equal = torch.empty_like(S)
    for run in tb.runs:
        torch.eq(run.by_item(S, 0), best_token[run.items(), None], out=run.by_item(equal, 0))
    equal *= from_last[0][tb.rows(), None]
    for run in tb.runs:
        torch.amax(run.by_item(equal, 0), 1, out=best_token[run.items()])
    code_i2t.copy_(best_token)
    for run in ib.runs:
        run.by_item(S, 1).eq_(best_patch[:, run.items(), None])
    S *= from_last[1][ib.rows()]
    for run in ib.runs:
        torch.amax(run.by_item(S, 1), 2, out=best_patch[:, run.items()])
    code_t2i.copy_(best_patch)
