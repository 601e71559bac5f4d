"""Backward of the chunked backend: only winners are touched, and every gradient row is owned by its destination.

A row of one side gets a share of each row that it won by (one in every item of the other side), and of each row that
won by it. The first are gathered by embedding_bag as they stand; the second once a stable sort has put them in the
order of their destinations. Where texts are short, the winners are so dense that both come faster by one product with
a matrix of their shares, zero elsewhere. Sums run in a fixed order: no atomics, the same bits every time.

Shape legend: I images, J texts, N patches, M text positions, D features. One side is `own`, the other `other`: a tile
is `rows` of `items` of the own side against `other_rows` of `other_items`.
"""

import torch
from torch import Tensor

from ds_cmli.cmli.check import winner_dtype
from ds_cmli.cmli.chunked_forward import Winners, run_tiles
from ds_cmli.cmli.chunked_tiles import Buffers, Codes, Tile, add_lost, add_product, add_won
from ds_cmli.cmli.ragged import Block, Side, largest, make_blocks, make_sides
from ds_cmli.cmli.tiling import Stripes, Widths, by_product, strip_rows, tile_sizes


def backward(
    grad_i2t: Tensor,
    grad_t2i: Tensor,
    image: Tensor,
    text: Tensor,
    text_mask: Tensor,
    image_mask: Tensor | None,
    arg_i2t: Tensor,
    arg_t2i: Tensor,
    scratch_bytes: int,
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of image and text in their dtype, summed in fp32 (fp64). Empty winners are computed again.

    Recomputed winners take half of `scratch_bytes`; where those of all images do not fit, stripes of images go one
    after the other. The text's gradient is then summed over stripes, for 16-bit inputs in an fp32 copy, which is the
    one thing outside `scratch_bytes`.
    """
    (I, N, D), (J, M, _) = image.shape, text.shape  # noqa: E741
    images, texts = make_sides(image, text, text_mask, image_mask)
    d_image = _gradient_of(images, need_image)
    d_text = _gradient_of(texts, need_text)
    recompute = not arg_i2t.numel()
    stripes = Stripes.of(I, N, J, sum(texts.lengths), M, scratch_bytes) if recompute else Stripes(I, 1, scratch_bytes)
    most_text, most_image = tile_sizes(N, M, D, image.dtype, stripes.budget, backward=True)
    text_blocks = make_blocks(texts.lengths, most_text)
    add = stripes.number > 1
    text_total = d_text.to(texts.wide) if add else d_text

    for first in range(0, I, stripes.images):
        stop = min(first + stripes.images, I)
        image_blocks = make_blocks(images.lengths, most_image, first, stop)
        if not image_blocks or not text_blocks:
            continue
        if recompute:
            winners = _recompute(texts, images, first, stop, N, M, stripes.budget)
        else:
            winners = Winners(arg_i2t.view(J, I * N), arg_t2i.view(J * M, I))
        if need_image:
            codes = _image_codes(winners)
            _add_up(images, texts, image_blocks, text_blocks, grad_i2t, grad_t2i, codes, stripes.budget, d_image, False)
        if need_text:
            codes = _text_codes(winners)
            grads = grad_t2i.t(), grad_i2t.t()
            _add_up(texts, images, text_blocks, image_blocks, *grads, codes, stripes.budget, text_total, add)
        del winners, codes
    if text_total is not d_text:
        d_text.copy_(text_total)
    return d_image.view(image.shape) if need_image else d_image, d_text.view(text.shape) if need_text else d_text


def _gradient_of(side: Side, needed: bool) -> Tensor:
    """Zeros [B * P, D] where some rows get no gradient; nothing if nobody asks."""
    return torch.zeros_like(side.features) if needed else side.features.new_empty(0)


def _image_codes(winners: Winners) -> Codes:
    def codes(image: Block, text: Block) -> tuple[Tensor, Tensor]:
        i2t, t2i = winners.tile(text, image)
        return i2t.t(), t2i.t()

    return codes


def _text_codes(winners: Winners) -> Codes:
    def codes(text: Block, image: Block) -> tuple[Tensor, Tensor]:
        i2t, t2i = winners.tile(text, image)
        return t2i, i2t

    return codes


def _recompute(texts: Side, images: Side, first: int, stop: int, N: int, M: int, budget: int) -> Winners:
    """The winners of all texts and the images [first, stop) of the sorted order."""
    D = texts.features.shape[1]
    most_text, most_image = tile_sizes(N, M, D, texts.features.dtype, budget, backward=False)
    image_blocks = make_blocks(images.lengths, most_image, first, stop)
    item, row = image_blocks[0].item, image_blocks[0].row
    new = texts.features.new_empty
    winners = Winners(
        new((len(texts.lengths), sum(images.lengths[first:stop])), dtype=winner_dtype(M)),
        new((sum(texts.lengths), stop - item), dtype=winner_dtype(N)),
        item,
        row,
    )
    run_tiles(texts, images, make_blocks(texts.lengths, most_text), image_blocks, None, winners)
    return winners


def _add_up(
    own: Side,
    other: Side,
    own_blocks: list[Block],
    other_blocks: list[Block],
    grad_own: Tensor,
    grad_other: Tensor,
    codes: Codes,
    budget: int,
    into: Tensor,
    add: bool,
) -> None:
    """The gradient of the own side's features, written or added to `into` [B * P, D].

    grad_own, grad_other: [own items, other items], of the score that is a mean over own rows, and over other rows.
    """
    most, most_other = largest(own_blocks), largest(other_blocks)
    cpu, width = own.features.device.type == "cpu", Widths.of(own.wide)
    extents = [(ob.extent(), xb.extent()) for ob in own_blocks for xb in other_blocks]
    strips = [strip_rows(*e, budget, width) * e[1].rows for e in extents if by_product(*e, cpu)]
    buffers = Buffers.new(most, most_other, own.features, own.wide, max(strips, default=0))
    load_buffers = other.load_buffers(most_other.rows)
    for ob in own_blocks:
        sums = buffers.total[: ob.height].zero_()
        for xb in other_blocks:
            table = other.load(xb, load_buffers)  # [other_rows, D]
            tile = Tile(own, other, ob, xb, grad_own, grad_other)
            if by_product(ob.extent(), xb.extent(), cpu):
                rows = strip_rows(ob.extent(), xb.extent(), budget, width)
                add_product(tile, codes, table, rows, buffers, sums)
            else:
                won, lost = codes(ob, xb)
                add_won(tile, won, table, buffers, sums)
                add_lost(tile, lost, table, buffers, sums)
        own.store(ob, sums, into, add)
