"""All-pairs CMLI on a GPU by Triton kernels that never store the similarities: what `cmli_scores`
calls.

Products are fp32 sums of 16-bit products on tensor cores, plain fp32 for fp32 (never tf32), fp64
for fp64. Nothing is tuned at run time and nothing is added atomically: the same input gives the
same bits on the same kind of GPU.

Shape legend: I images, J texts, N patches, M text positions (padded), D features.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ds_cmli.cmli.inputs import Sides, Wanted, index_dtype
from ds_cmli.cmli.triton.forward_kernel import combine_kernel, forward_kernel, suspect_kernel
from ds_cmli.cmli.triton.gradient import OneSide, write_gradient
from ds_cmli.cmli.triton.tiles import (
    ForwardTiles,
    Sequences,
    Walk,
    device_limits,
    forward_tiles,
    launcher,
    power_of_two,
    text_tiles,
    tiles_at_most,
    walk,
)
from ds_cmli.cmli.without_data import has_data

TEXTS_PER_PROGRAM = 64  # an image block, loaded once for so many, is under 5% of the loads
HUGE = 2.0**50  # products of smaller inputs cannot overflow fp32, and so give no NaN by themselves


class Launch(NamedTuple):
    """What all launches of the forward kernel share."""

    sides: Sides  # contiguous
    images: Sequences
    texts: Sequences
    suspect: Tensor  # [1] int32: some product may give a NaN
    tiles: ForwardTiles
    save: bool


def forward(
    sides: Sides, scratch_bytes: int, save_argmax: bool, kept: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the scores of all pairs, and the argmax indices for `backward`.

    Args:
        sides: image and text float64, float32, bfloat16 or float16, of one dtype.
        scratch_bytes: bound on the partial maxima of images of more than one block of patches, one
            pair's at least.
        save_argmax: False leaves the two index tensors empty.
        kept: uint8 [I, J], 0 for pairs that are not computed; None: all are.

    Returns:
        `Sides.new_results`: s_i2t, s_t2i; arg_i2t, arg_t2i: the
        winning token of each patch and the winning patch of each token, uint8 where the side they
        index is at most 256 long, else int16. Where nothing was computed (padding, empty texts,
        pairs that are not kept) they hold some valid index.

    Equations (1)-(4) of the source document (FILIP, arXiv 2111.07783, equations 4-5).
    """
    _check_device(sides.image)
    image, text = sides.image.contiguous(), sides.text.contiguous()
    (I, N, D), (J, M, _) = image.shape, text.shape  # noqa: E741
    images = Sequences(sides.image_mask, I, N, image.device)
    texts = Sequences(sides.token_mask, J, M, image.device)
    tiles = forward_tiles(N, M, D, image.dtype, *device_limits(image.device))
    results = sides.new_results(save_argmax)
    sizes = Sizes(I, J, N, M, D)
    _, i_step, j_step = partial_chunk(sizes, tiles, results[0].itemsize, scratch_bytes)
    contiguous = sides._replace(image=image, text=text)
    suspect = _suspect(image, text)
    launch = Launch(contiguous, images, texts, suspect, tiles, save_argmax)
    with _device(image):
        for j in range(0, J, j_step):
            of_texts = slice(j, j + j_step)
            lists = text_tiles(_part(texts, of_texts), tiles.tokens)
            for i in range(0, I, i_step):
                of_images = slice(i, i + i_step)
                out = [x[of_images, of_texts] if x.numel() else x for x in results]
                some = None if kept is None else kept[of_images, of_texts]
                walks = [walk(tiles, TEXTS_PER_PROGRAM, some) for tiles in lists]
                _launch_forward(launch, out, of_images, of_texts, walks, some)
    return results


def backward(
    sides: Sides,
    grads: tuple[Tensor, Tensor],
    argmax: tuple[Tensor, Tensor],
    wanted: Wanted,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Compute d_image [I, N, D] and d_text [J, M, D] in the inputs' dtype, empty where not wanted.

    Masked positions get zeros. Sums are fp32, fp64 for fp64.

    Args:
        grads: of both scores, [I, J] each.
        argmax: the indices that `forward` has saved. Where these are empty the forward kernel finds
            them again: for a group of images at a time for d_image, of texts for d_text.
        scratch_bytes: bound on the indices of a group, with the lists of pairs that have a
            gradient, and on the lists of the sparse kernels, half of it each, one sequence's at
            least.
    """
    _check_device(sides.image)
    sides = sides._replace(image=sides.image.contiguous(), text=sides.text.contiguous())
    image, text, token_mask, image_mask, one_way = sides[:5]
    (I, N, _), (J, M, _) = image.shape, text.shape  # noqa: E741
    images = Sequences(image_mask, I, N, image.device)
    texts = Sequences(token_mask, J, M, image.device)
    wide = torch.promote_types(image.dtype, torch.float32)
    grad_i2t, grad_t2i = (grad.to(wide).contiguous() for grad in grads)
    if sides.one_way:
        grad_i2t = torch.zeros_like(grad_t2i)
    d_image = torch.zeros_like(image) if wanted.image else image.new_empty((0,))
    d_text = torch.zeros_like(text) if wanted.text else text.new_empty((0,))
    i_step, j_step = I, J
    recompute = argmax[1].numel() == 0
    if recompute:
        tiles = forward_tiles(N, M, image.shape[2], image.dtype, *device_limits(image.device))
        pair_bytes = _pair_bytes(N * (not one_way), M) + _listed_pair(M, tiles)
        i_step, j_step = _groups(I, J, pair_bytes, scratch_bytes // 2)

    def indices(i: slice, j: slice) -> tuple[Tensor, Tensor]:
        mask = None if image_mask is None else image_mask[i]
        part = Sides(image[i], text[j], token_mask[j], mask, one_way)
        # A pair without a gradient has no weight in the sums, whatever its indices are.
        kept = (grad_i2t[i, j] != 0).logical_or_(grad_t2i[i, j] != 0).view(torch.uint8)
        _, _, arg_i2t, arg_t2i = forward(part, scratch_bytes, True, kept)
        return arg_i2t.view(*kept.shape, -1), arg_t2i

    everything = slice(None)
    shared = None if recompute else (argmax[0].view(I, J, -1), argmax[1])
    if recompute and (i_step, j_step) == (I, J):
        shared = indices(everything, everything)

    # Functions, so that the indices of a group are freed before those of the next are found.
    def of_images(some: slice) -> None:
        arg_i2t, arg_t2i = shared or indices(some, everything)
        of_p = OneSide(_part(images, some), arg_i2t, grad_i2t[some])
        of_q = OneSide(texts, arg_t2i, grad_t2i[some])
        write_gradient(d_image[some], text, of_p, of_q, 0, scratch_bytes // 2)

    def of_texts(some: slice) -> None:
        arg_i2t, arg_t2i = shared or indices(everything, some)
        of_p = OneSide(_part(texts, some), arg_t2i, grad_t2i[:, some])
        of_q = OneSide(images, arg_i2t, grad_i2t[:, some])
        write_gradient(d_text[some], image, of_p, of_q, 1, scratch_bytes // 2)

    with _device(image):
        for start in range(0, I if wanted.image else 0, i_step):
            of_images(slice(start, start + i_step))
        for start in range(0, J if wanted.text else 0, j_step):
            of_texts(slice(start, start + j_step))
    return d_image, d_text


class Sizes(NamedTuple):
    """The shapes of image [I, N, D] and text [J, M, D]."""

    I: int  # noqa: E741
    J: int
    N: int
    M: int
    D: int


def _launch_forward(
    launch: Launch,
    out: list[Tensor],
    of_images: slice,
    of_texts: slice,
    walks: list[Walk],
    kept: Tensor | None,
) -> None:
    """Score a part of the images with a part of the texts, over whose tiles the walks go."""
    s_i2t, s_t2i, arg_i2t, arg_t2i = out
    image, text = launch.sides.image[of_images], launch.sides.text[of_texts]
    images, texts = _part(launch.images, of_images), _part(launch.texts, of_texts)
    tiles, save, both = launch.tiles, launch.save, not launch.sides.one_way
    (I, N, D), (J, M, _) = image.shape, text.shape  # noqa: E741
    blocks = math.ceil(N / tiles.rows)
    row_out, column_out, column_arg = s_i2t, s_t2i, arg_t2i
    if blocks > 1:
        row_out = s_i2t.new_empty((I, blocks, J * both))
        column_out = s_i2t.new_empty((I, blocks, J, M))
        column_arg = image.new_empty((I, blocks, J, M) if save else (0,), dtype=index_dtype(N))
    for width, tile in zip(tiles.tokens, walks, strict=True):
        launcher(forward_kernel, (I * blocks, math.ceil(J / TEXTS_PER_PROGRAM)))(
            row_out, column_out, arg_i2t, column_arg, image, text, images.mask, texts.mask,
            images.counts, texts.counts, launch.suspect, tile.first, tile.code,
            s_t2i.stride(0), arg_i2t.stride(0), arg_t2i.stride(0), tile.code_stride,
            tile.first_stride, J, N, M, tile.slots, tile.unit, tile.last, D=D, ROWS=tiles.rows,
            TOKENS=width,
            BD=tiles.features, BLOCKS=blocks, MASKED=images.masked, SAVE=save, STAGES=tiles.stages,
            BOTH=both, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    if blocks > 1:
        launcher(combine_kernel, (I * J,))(
            s_i2t, s_t2i, arg_t2i, row_out, column_out, column_arg, texts.mask,
            images.counts, texts.counts, images.counts if kept is None else kept,
            s_t2i.stride(0), arg_t2i.stride(0), 0 if kept is None else kept.stride(0), J, M,
            BLOCKS=blocks, WIDTH=power_of_two(M), SAVE=save, KEPT=kept is not None,
            BOTH=both,
        )  # fmt: skip


def _part(side: Sequences, some: slice) -> Sequences:
    part = Sequences.__new__(Sequences)
    part.length, part.masked = side.length, side.masked
    part.mask, part.counts, part.ends = side.mask[some], side.counts[some], side.ends[some]
    part.sequences = len(part.counts)
    return part


def _suspect(image: Tensor, text: Tensor) -> Tensor:
    """[1] int32: not 0 if products of the two may give a NaN."""
    suspect = torch.zeros(1, dtype=torch.int32, device=image.device)
    for x in (image, text):
        programs = (math.ceil(x.numel() / 8192),)
        launcher(suspect_kernel, programs)(suspect, x, x.numel(), HUGE, WIDTH=8192)
    return suspect


def _pair_bytes(N: int, M: int) -> int:
    """Bytes of the argmax indices of one pair."""
    return N * index_dtype(M).itemsize + M * index_dtype(N).itemsize


def _listed_pair(M: int, tiles: ForwardTiles) -> int:
    """Bytes that say whether one pair is kept, and of its tiles in an image's list."""
    return 2 + 4 * sum(tiles_at_most(M, tiles.tokens))


def _groups(I: int, J: int, pair_bytes: int, index_bytes: int) -> tuple[int, int]:  # noqa: E741
    """Images and texts whose indices are found again at a time."""
    if I * J * pair_bytes <= index_bytes:
        return I, J
    return max(1, index_bytes // (J * pair_bytes)), max(1, index_bytes // (I * pair_bytes))


def _partial_pair(blocks: int, M: int, acc: int) -> int:
    """Bytes of the partial results of one pair."""
    return blocks * (acc + M * (acc + 2))


def partial_chunk(
    sizes: Sizes, tiles: ForwardTiles, acc: int, scratch_bytes: int
) -> tuple[int, int, int]:
    """An image's blocks of patches, and the images and texts to take at a time.

    So many that the partial results of all blocks stay within the budget.
    """
    I, J, N, M, _ = sizes  # noqa: E741
    blocks = math.ceil(N / tiles.rows)
    pairs = I * J
    if blocks > 1:
        pairs = max(1, scratch_bytes // _partial_pair(blocks, M, acc))
    return blocks, max(1, min(I, pairs // J)), min(J, pairs)


def _interpreted() -> bool:
    return type(forward_kernel).__name__ == "InterpretedFunction"


def _check_device(x: Tensor) -> None:
    if has_data(x) and x.device.type != "cuda" and not _interpreted():
        raise RuntimeError(
            f"backend='triton' runs on CUDA tensors, not on {x.device}: use backend='chunked'"
        )


def _device(x: Tensor) -> AbstractContextManager:
    # Triton launches on the current device, which need not be the tensors'.
    if x.device.type == "cuda":
        return torch.cuda.device(x.device)
    return nullcontext()
