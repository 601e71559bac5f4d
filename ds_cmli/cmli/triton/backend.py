"""All-pairs CMLI on a GPU by Triton kernels that never store the similarities: what `cmli_scores` calls.

Products are fp32 sums of 16-bit products on tensor cores, plain fp32 for fp32 (never tf32), fp64 for fp64. Nothing is
tuned at run time and nothing is added atomically: the same input gives the same bits on the same kind of GPU.

Shape legend: I images, J texts, N patches, M text positions (padded), D features.
"""

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from ds_cmli.cmli.check import index_dtype
from ds_cmli.cmli.triton.backward_kernel import gradient_kernel
from ds_cmli.cmli.triton.forward_kernel import combine_kernel, forward_kernel
from ds_cmli.cmli.triton.tiles import (
    ForwardTiles,
    Sequences,
    TileList,
    backward_tiles,
    forward_tiles,
    power_of_two,
    row_tiles,
    source_steps,
    text_tiles,
)

TEXTS_PER_PROGRAM = (
    64  # an image block is loaded once for so many texts: under 5% of what they load
)
HUGE = (
    2.0**50
)  # products of smaller inputs cannot overflow fp32: no NaN without a NaN or inf at the input


def forward(
    image: Tensor,
    text: Tensor,
    token_mask: Tensor,
    image_mask: Tensor | None,
    scratch_bytes: int,
    save_argmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores of all pairs, and the argmax indices for `backward`.

    Args:
        image: [I, N, D] float64, float32, bfloat16 or float16; text: [J, M, D] of the same dtype.
        token_mask: [J, M] bool, True = valid; image_mask: [I, N] bool or None = all valid.
        scratch_bytes: bound on the partial maxima of images of more than one block of patches, one pair's at least.
        save_argmax: False leaves the two index tensors empty.

    Returns:
        s_i2t, s_t2i [I, J] float32 (float64 for float64); arg_i2t [I, J, N], arg_t2i [I, J, M]: the winning token of
        each patch and the winning patch of each token, uint8 where the side they index is at most 256 long, else int16.
        Where nothing was computed (padding, empty texts) they hold some valid index.

    Equations (1)-(4) of the source document (FILIP, arXiv 2111.07783, equations 4-5).
    """
    _check_device(image)
    image, text = image.contiguous(), text.contiguous()
    (I, N, D), (J, M, _) = image.shape, text.shape  # noqa: E741
    images, texts = (
        Sequences(image_mask, I, N, image.device),
        Sequences(token_mask, J, M, image.device),
    )
    tiles = forward_tiles(N, M, D, image.dtype, *_limits(image.device))
    s_i2t = image.new_zeros((I, J), dtype=torch.promote_types(image.dtype, torch.float32))
    s_t2i = torch.zeros_like(s_i2t)
    arg_i2t = torch.zeros(
        (I, J, N) if save_argmax else (0,), dtype=index_dtype(M), device=image.device
    )
    arg_t2i = torch.zeros(
        (I, J, M) if save_argmax else (0,), dtype=index_dtype(N), device=image.device
    )
    i_step, j_step = _partial_chunk(I, J, N, M, tiles, s_i2t.dtype, scratch_bytes)
    suspect = _suspect(image) | _suspect(text)
    with _device(image):
        for j in range(0, J, j_step):
            some = slice(j, j + j_step)
            lists = text_tiles(_part(texts, some), tiles.tokens)
            for i in range(0, I, i_step):
                out = [
                    x[i : i + i_step, some] if x.ndim > 1 else x
                    for x in (s_i2t, s_t2i, arg_i2t, arg_t2i)
                ]
                _launch_forward(
                    out, image[i : i + i_step], text[some], _part(images, slice(i, i + i_step)), _part(texts, some),
                    suspect, tiles, lists, save_argmax,
                )  # fmt: skip
    return s_i2t, s_t2i, arg_i2t, arg_t2i


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
    """Gradients of the scores, (d_image [I, N, D], d_text [J, M, D]) in the inputs' dtype; empty where not needed.

    grad_i2t, grad_t2i: [I, J]. The other arguments are those of `forward` and its indices; where these are empty the
    forward kernel finds them again: for a group of images at a time for d_image, of texts for d_text, each group's
    indices within `scratch_bytes` (at least one sequence's). Masked positions get zeros. Sums are fp32, fp64 for fp64.
    """
    _check_device(image)
    image, text = image.contiguous(), text.contiguous()
    (I, N, _), (J, M, _) = image.shape, text.shape  # noqa: E741
    images, texts = (
        Sequences(image_mask, I, N, image.device),
        Sequences(token_mask, J, M, image.device),
    )
    grads = [
        g.to(torch.promote_types(image.dtype, torch.float32)).contiguous()
        for g in (grad_i2t, grad_t2i)
    ]
    d_image = torch.zeros_like(image) if need_image else image.new_empty((0,))
    d_text = torch.zeros_like(text) if need_text else text.new_empty((0,))
    i_step, j_step = I, J
    pair_bytes = N * index_dtype(M).itemsize + M * index_dtype(N).itemsize
    recompute = arg_i2t.numel() == 0
    if recompute and I * J * pair_bytes > scratch_bytes:
        i_step = max(1, scratch_bytes // (J * pair_bytes))
        j_step = max(1, scratch_bytes // (I * pair_bytes))

    def indices(i: slice, j: slice) -> list[Tensor]:
        if not recompute:
            return [arg_i2t, arg_t2i]
        mask = None if image_mask is None else image_mask[i]
        return list(forward(image[i], text[j], token_mask[j], mask, scratch_bytes, True)[2:])

    everything = slice(None)
    shared = (
        indices(everything, everything) if not recompute or (i_step, j_step) == (I, J) else None
    )
    with _device(image):
        for start in range(0, I if need_image else 0, i_step):
            some = slice(start, start + i_step)
            args = shared or indices(some, everything)
            _launch_gradient(
                d_image[some], text, _part(images, some), texts, args, [g[some] for g in grads], p_axis=0
            )  # fmt: skip
            del args
        for start in range(0, J if need_text else 0, j_step):
            some = slice(start, start + j_step)
            args = shared or indices(everything, some)
            _launch_gradient(
                d_text[some], image, _part(texts, some), images, args[::-1], [g[:, some] for g in grads[::-1]], p_axis=1
            )  # fmt: skip
            del args
    return d_image, d_text


def peak_bytes(
    I: int,  # noqa: E741
    J: int,
    N: int,
    M: int,
    D: int,
    dtype: torch.dtype,
    recompute: bool,
    scratch_bytes: int,
    limits: tuple[tuple[int, int], int] | None = None,
) -> tuple[int, int]:
    """Bytes that `forward` and `backward` hold at their peaks beyond their arguments (indices saved by the forward are
    an argument of the backward), results included; the gradients of both inputs. `limits`: (compute capability, shared
    memory of a block), those of the current GPU, or of an sm_80 without one.
    """
    acc = max(4, dtype.itemsize)
    index = N * index_dtype(M).itemsize + M * index_dtype(N).itemsize
    tiles = forward_tiles(N, M, D, dtype, *(limits or _limits(torch.device("cuda"))))
    blocks = math.ceil(N / tiles.rows)
    i_step, j_step = _partial_chunk(
        I, J, N, M, tiles, torch.float64 if acc == 8 else torch.float32, scratch_bytes
    )

    def lists(
        sequences: int, length: int
    ) -> int:  # tile lists of a side and what building them takes
        return sequences * (24 * (math.ceil(length / 16) + 2) + 16)

    def sides(images_: int, texts_: int) -> int:  # masks and lengths
        return images_ * (4 * N + 16) + texts_ * (4 * M + 16)

    def run(images_: int, texts_: int, save: bool) -> int:
        partial = 0
        if blocks > 1:
            pairs = min(i_step, images_) * min(j_step, texts_)
            partial = pairs * (_partial_pair(blocks, M, acc) - (not save) * 2 * blocks * M)
        outputs = images_ * texts_ * (2 * acc + save * index)
        return outputs + partial + sides(images_, texts_) + lists(texts_, M)

    gradients = (I * N + J * M) * D * dtype.itemsize
    backward = gradients + 3 * I * J * acc + sides(I, J) + 2 * lists(I, N) + 2 * lists(J, M)
    if recompute:
        if I * J * index <= scratch_bytes:
            backward += run(I, J, True)
        else:
            group_i, group_j = (
                max(1, scratch_bytes // (J * index)),
                max(1, scratch_bytes // (I * index)),
            )
            backward += max(run(group_i, J, True), run(I, group_j, True))
    return run(I, J, not recompute), backward


def _launch_forward(
    out: list[Tensor],
    image: Tensor,
    text: Tensor,
    images: Sequences,
    texts: Sequences,
    suspect: Tensor,
    tiles: ForwardTiles,
    lists: list[TileList],
    save: bool,
) -> None:
    s_i2t, s_t2i, arg_i2t, arg_t2i = out
    (I, N, D), (J, M, _) = image.shape, text.shape  # noqa: E741
    blocks = math.ceil(N / tiles.rows)
    row_out, column_out, column_arg = s_i2t, s_t2i, arg_t2i
    if blocks > 1:
        row_out = s_i2t.new_empty((I, blocks, J))
        column_out = s_i2t.new_empty((I, blocks, J, M))
        column_arg = torch.empty(
            (I, blocks, J, M) if save else (0,), dtype=index_dtype(N), device=image.device
        )
    for width, tile in zip(tiles.tokens, lists, strict=True):
        forward_kernel[(I * blocks, math.ceil(J / TEXTS_PER_PROGRAM))](
            row_out, column_out, arg_i2t, column_arg, image, text, images.mask, texts.mask, images.counts,
            texts.counts, suspect, tile.first, tile.code, s_i2t.stride(0), arg_i2t.stride(0), arg_t2i.stride(0),
            J, N, M, tile.slots, TEXTS_PER_PROGRAM, D=D, ROWS=tiles.rows, TOKENS=width, BD=tiles.features,
            BLOCKS=blocks, MASKED=images.masked, SAVE=save, STAGES=tiles.stages, num_warps=tiles.warps,
            num_stages=tiles.stages,
        )  # fmt: skip
    if blocks > 1:
        combine_kernel[(I * J,)](
            s_i2t, s_t2i, arg_t2i, row_out, column_out, column_arg, texts.mask, images.counts, texts.counts,
            s_i2t.stride(0), arg_t2i.stride(0), J, M, BLOCKS=blocks, WIDTH=power_of_two(M), SAVE=save,
        )  # fmt: skip


def _launch_gradient(
    out: Tensor,
    source: Tensor,
    p: Sequences,
    q: Sequences,
    indices: list[Tensor],
    grads: list[Tensor],
    p_axis: int,
) -> None:
    """Write the gradient of side p, given (indices of p's positions, of q's) and (gradients of p's score, of q's).

    The pair axes of indices and gradients are images, texts, so p's is 0 or 1.
    """
    tiles = backward_tiles(out.shape[-1], out.dtype)
    rows, (long, short) = row_tiles(p), source_steps(q, tiles.step)
    p_inverse, q_inverse = p.inverse_counts(grads[0].dtype), q.inverse_counts(grads[0].dtype)
    other = 1 - p_axis
    by_pair = q_inverse[None, :] if p_axis == 0 else q_inverse[:, None]
    scale = torch.linalg.vector_norm(grads[0], math.inf, other) * p_inverse
    scale += torch.linalg.vector_norm(grads[1] * by_pair, math.inf, other)
    scale = torch.where(scale == 0, 1.0, scale.clamp(min=1e-30))
    two_terms = out.dtype == torch.bfloat16
    programs = math.ceil(rows.bound / (tiles.rows // 16)), math.ceil(out.shape[-1] / tiles.features)
    gradient_kernel[programs](
        out, p.mask, rows.code, rows.first, p_inverse, scale, source, q.mask, long.code,
        long.first, short.code, short.first, q_inverse, *indices, *grads,
        indices[0].stride(p_axis), indices[0].stride(other), indices[1].stride(p_axis), indices[1].stride(other),
        grads[0].stride(p_axis), grads[0].stride(other), p.sequences, q.sequences, p.length, q.length, rows.slots,
        long.slots, 2 if two_terms else 1, D=out.shape[-1], BD=tiles.features, ROWS=tiles.rows, LONG=tiles.step,
        P_MASKED=p.masked, Q_MASKED=q.masked, TWO_TERMS=two_terms, STAGES=tiles.stages, num_warps=tiles.warps,
        num_stages=tiles.stages,
    )  # fmt: skip


def _part(side: Sequences, some: slice) -> Sequences:
    part = Sequences.__new__(Sequences)
    part.length, part.masked = side.length, side.masked
    part.mask, part.counts, part.ends = side.mask[some], side.counts[some], side.ends[some]
    part.sequences = len(part.counts)
    return part


def _suspect(x: Tensor) -> Tensor:
    """[] bool: whether products of x may give a NaN."""
    return ~((x.amax().double() <= HUGE) & (x.amin().double() >= -HUGE))


def _partial_pair(blocks: int, M: int, acc: int) -> int:
    return blocks * (acc + M * (acc + 2))


def _partial_chunk(
    I: int,  # noqa: E741
    J: int,
    N: int,
    M: int,
    tiles: ForwardTiles,
    dtype: torch.dtype,
    scratch_bytes: int,
) -> tuple[int, int]:
    """Images and texts to take at a time so that the partial results of several blocks stay within the budget."""
    blocks = math.ceil(N / tiles.rows)
    pairs = (
        I * J if blocks == 1 else max(1, scratch_bytes // _partial_pair(blocks, M, dtype.itemsize))
    )
    return max(1, min(I, pairs // J)), min(J, pairs)


def _interpreted() -> bool:
    return type(forward_kernel).__name__ == "InterpretedFunction"


def _check_device(x: Tensor) -> None:
    if x.device.type != "cuda" and not _interpreted():
        raise RuntimeError(
            f"backend='triton' runs on CUDA tensors, not on {x.device}: use backend='chunked'"
        )


def _device(x: Tensor):
    # Triton launches on the current device, which need not be the tensors'.
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def _limits(device: torch.device) -> tuple[tuple[int, int], int]:
    if not torch.cuda.is_available():
        return (8, 0), 163 * 1024
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(
        properties, "shared_memory_per_block_optin", properties.shared_memory_per_block
    )
    return (properties.major, properties.minor), shared
