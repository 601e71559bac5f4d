"""All-pairs CMLI in plain PyTorch: tiles of the similarity tensor that live one at a time, on any device.

Forward: a tile is one matrix product of a block of texts with a block of images, and both maxima come from it. What
backward needs is which position won, in one byte (two where a side is longer than 256). Backward touches only winners:
each gradient row is a weighted sum of the rows it won and the rows that it was won by, gathered by embedding_bag.
Each gradient is owned by its destination and summed in a fixed order: no atomics, the same bits every time.

Winners are private to this file: they lie in the order the tiles use, code_i2t [J, K] and code_t2i [T, I] (texts and
images sorted by length, K and T the valid rows of all images and texts), and count from the *last* valid position of
the winning item: 0 is the last one. So a row of NaN, which equals no maximum, still gets an index within range.

Shape legend: I images, J texts, N patches, M text positions, D features; K patches and T tokens of a tile.
"""

import platform

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.cmli.ragged import Block, Side, host_lengths
from ds_cmli.cmli.plan import Plan, make_plan
from ds_cmli.cmli.op import winner_dtype

# oneDNN's fp32 product is twice as fast as MKL's on AMD processors and as fast on Intel's; PyTorch's `mm` is MKL.
ONEDNN = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")


def product(text: Tensor, image: Tensor) -> Tensor:
    """text [T, D] @ image [K, D]^T -> [T, K]."""
    if ONEDNN and text.dtype == torch.float32 and text.device.type == "cpu":
        return torch.ops.mkldnn._linear_pointwise(text, image, None, "none", [], "")
    return torch.mm(text, image.t())


def forward(
    image: Tensor, text: Tensor, text_mask: Tensor, image_mask: Tensor | None, scratch_bytes: int, save_argmax: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores of all pairs [I, J] twice, and the winners [I, J, N] and [I, J, M] (empty unless `save_argmax`)."""
    (I, N, D), (J, M, _) = image.shape, text.shape
    images, texts = _sides(image, text, text_mask, image_mask)
    s_i2t = torch.zeros(I, J, dtype=images.dtype, device=image.device)
    s_t2i = torch.zeros_like(s_i2t)
    arg_i2t = image.new_empty((I, J, N) if save_argmax else (0,), dtype=winner_dtype(M))
    arg_t2i = image.new_empty((I, J, M) if save_argmax else (0,), dtype=winner_dtype(N))
    plan = make_plan(I, J, N, M, D, image.dtype, scratch_bytes)
    image_blocks = images.blocks(plan.image_rows, plan.images)
    codes = (arg_i2t.view(J, I * N), arg_t2i.view(J * M, I)) if save_argmax else None
    _tiles(images, texts, image_blocks, plan, (s_i2t, s_t2i), codes)
    return s_i2t, s_t2i, arg_i2t, arg_t2i


def _sides(image: Tensor, text: Tensor, text_mask: Tensor, image_mask: Tensor | None) -> tuple[Side, Side]:
    text_lengths, image_lengths = host_lengths(text_mask, image_mask)
    images = Side(image, image_mask, image_lengths or [image.shape[1]] * image.shape[0])
    return images, Side(text, text_mask, text_lengths)


def _tiles(
    images: Side,
    texts: Side,
    image_blocks: list[Block],
    plan: Plan,
    scores: tuple[Tensor, Tensor] | None,
    codes: tuple[Tensor, Tensor] | None,
) -> None:
    """Go over the tiles of these image blocks with all texts; fill in scores and winners, whichever are wanted.

    The winners' rows and columns start with the first of the image blocks.
    """
    buffers = plan.load_buffers(images.features)
    text_blocks = texts.blocks(plan.text_rows, plan.texts)
    for ib in image_blocks:
        V = images.load(ib, *buffers.image)  # [K, D]
        for tb in text_blocks:
            W = texts.load(tb, *buffers.text)  # [T, D]
            S = product(W, V)  # [T, K]
            best_token = S.new_empty(tb.count, ib.height)  # [J', K]
            for run in tb.runs:
                torch.amax(_texts(S, run), 1, out=best_token[run.items()])
            best_patch = S.new_empty(tb.height, ib.count)  # [T, I']
            for run in ib.runs:
                torch.amax(_images(S, run), 2, out=best_patch[:, run.items()])
            if codes is not None:
                first = image_blocks[0]
                k, i = ib.row0 - first.row0, ib.item0 - first.item0
                _winners(S, best_token, best_patch, images, texts, ib, tb, (
                    codes[0][tb.items(), k : k + ib.height], codes[1][tb.rows(), i : i + ib.count]
                ))
            if scores is not None:
                where = (images.order[ib.items(), None], texts.order[tb.items()])
                mean = S.new_empty(tb.count, ib.count)  # [J', I']
                for run in ib.runs:
                    torch.mean(_images(best_token, run), 2, out=mean[:, run.items()])
                scores[0].index_put_(where, mean.t())
                for run in tb.runs:
                    torch.mean(_texts(best_patch, run), 1, out=mean[run.items()])
                scores[1].index_put_(where, mean.t())
            del S


def _texts(rows: Tensor, run) -> Tensor:
    """[T, X] -> [texts of the run, tokens, X]"""
    return rows[run.rows()].unflatten(0, (run.count, run.length))


def _images(columns: Tensor, run) -> Tensor:
    """[X, K] -> [X, images of the run, patches]"""
    return columns[:, run.rows()].unflatten(1, (run.count, run.length))


def _winners(S, best_token, best_patch, images: Side, texts: Side, ib: Block, tb: Block, codes) -> None:
    """The first position that equals its maximum, in three vectorised passes: index by equality beats argmax 3 times.

    Equality as 0 or 1, times the distance from the last position; the largest of those belongs to the first equal.
    """
    equal = torch.empty_like(S)
    for run in tb.runs:
        torch.eq(_texts(S, run), best_token[run.items(), None], out=_texts(equal, run))
    equal *= texts.from_last[tb.rows(), None]
    for run in tb.runs:
        codes[0][run.items()] = _texts(equal, run).amax(1)
    for run in ib.runs:
        _images(S, run).eq_(best_patch[:, run.items(), None])
    S *= images.from_last[ib.rows()]
    for run in ib.runs:
        codes[1][:, run.items()] = _images(S, run).amax(2)


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
    """Gradients of the image and of the text, each in its dtype, summed in fp32 (fp64)."""
    (I, N, D), (J, M, _) = image.shape, text.shape
    images, texts = _sides(image, text, text_mask, image_mask)
    plan = make_plan(I, J, N, M, D, image.dtype, scratch_bytes)
    text_blocks = texts.blocks(plan.text_rows, plan.texts)
    image_blocks = images.blocks(plan.image_rows, plan.images)
    d_image = torch.zeros_like(images.features if need_image else image.new_empty(0))
    d_text = torch.zeros_like(texts.features if need_text else text.new_empty(0))

    def gradients(some_images: list[Block], code_i2t: Tensor, code_t2i: Tensor, d_text: Tensor, add: bool) -> None:
        if need_image:
            _gradient(images, texts, some_images, text_blocks, plan, grad_i2t, grad_t2i, code_i2t.t(), code_t2i.t(), d_image)
        if need_text:
            _gradient(texts, images, text_blocks, some_images, plan, grad_t2i.t(), grad_i2t.t(), code_t2i, code_i2t, d_text, add)

    if arg_i2t.numel():
        gradients(image_blocks, arg_i2t.view(J, I * N), arg_t2i.view(J * M, I), d_text, False)
        return d_image.view(image.shape) if need_image else d_image, d_text.view(text.shape) if need_text else d_text
    raise NotImplementedError


def _gradient(
    own: Side,
    other: Side,
    own_blocks: list[Block],
    other_blocks: list[Block],
    plan: Plan,
    grad_own: Tensor,
    grad_other: Tensor,
    code_own: Tensor,
    code_other: Tensor,
    into: Tensor,
    add: bool = False,
) -> None:
    """The gradient of one side's features, block by block, from all the other side's winners and losers."""
    for ob in own_blocks:
        acc = torch.zeros(ob.height, own.features.shape[1], dtype=own.dtype, device=own.order.device)
        for xb in other_blocks:
            table = other.load(xb, *plan.load_buffers(other.features).image)
            where = (own.order[ob.items(), None], other.order[xb.items()])
            # What each own row won, one row in each of the other items.
            g = grad_own[where] * own.scale[ob.items(), None]
            index = torch.empty(ob.height, xb.count, dtype=torch.int32, device=acc.device).copy_(
                code_own[ob.rows(), xb.items()]
            )
            torch.sub(other.last[xb.items()] - xb.row0, index, out=index)
            w = acc.new_empty(ob.height, xb.count)
            for run in ob.runs:
                _texts(w, run).copy_(g[run.items(), None])
            acc += F.embedding_bag(index, table, per_sample_weights=w, mode="sum")
            # And the other rows that each own row was won by: sorted by own row.
            g = grad_other[where] * other.scale[xb.items()]
            w = acc.new_empty(ob.count, xb.height)
            for run in xb.runs:
                _images(w, run).copy_(g[:, run.items(), None])
            key = torch.empty(ob.count, xb.height, dtype=torch.int32, device=acc.device).copy_(
                code_other[ob.items(), xb.rows()]
            )
            torch.sub((own.last[ob.items()] - ob.row0)[:, None], key, out=key)
            key, perm = torch.sort(key.flatten(), stable=True)
            offsets = torch.searchsorted(key, torch.arange(ob.height, dtype=torch.int32), out_int32=True)
            w = w.flatten().index_select(0, perm)
            acc += F.embedding_bag(
                perm.remainder_(xb.height).to(torch.int32), table, offsets, per_sample_weights=w, mode="sum"
            )
        own.store(ob, acc, into, add)
