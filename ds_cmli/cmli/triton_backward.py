"""The Triton backward kernel: one product a side with matrices made from argmax indices.

    d_image[i, n] = sum_j  g_i2t[i,j]/N_i * text[j, a(i,j,n)]
                  + sum_{j, m: b(i,j,m) = n} g_t2i[i,j]/M_j * text[j, m]
    d_text[j, m]  = sum_i  g_t2i[i,j]/M_j * image[i, b(i,j,m)]
                  + sum_{i, n: a(i,j,n) = m} g_i2t[i,j]/N_i * image[i, n]

a, b are the best token and the best patch, N_i and M_j count valid positions. Both lines are one
formula with the roles changed, so there is one kernel: P is the side of the gradient, Q the
source's.

A program owns ROWS rows of the gradient, adds up over all of Q in a fixed order and writes each row
once: no atomics, the same bits every time. Rows come in tiles of 16 positions listed over all
sequences, and a program takes the next ROWS/16 tiles whichever sequences they belong to; the source
comes in long steps and, for what is left of a sequence, steps of 16. So neither N=196 nor short
texts waste products.

Shapes: P, Q sequences of the two sides; D features; in a program R tiles, ROWS = 16 R rows, STEP
source positions.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .op import Pair
from .triton_forward import (
    Side,
    TileList,
    device_limits,
    launcher,
    on_device,
    power_of_two,
    tile_list,
    tl,
    triton,
)


class BackwardTiles(NamedTuple):
    rows: int  # gradient rows a program owns
    step: int  # source positions a product takes; what is left of a sequence goes in steps of 16
    features: int
    warps: int
    stages: int


def backward_tiles(
    D: int, dtype: torch.dtype, capability: tuple[int, int], source_length: int
) -> BackwardTiles:
    """Tiles of the gradient kernel for one device, whose rows gather from sequences of
    `source_length` positions.

    Counted in the compiled kernels, 64 rows of 256 features take 21 to 42% fewer instructions a
    product than 128 x 128: each coefficient is made once for all features. fp16 takes steps of 64
    where the source is longer than that, as steps of 32 waste less on short texts. On sm_90 the two
    groups of warps would each make all coefficients of 64 rows, and spill in bf16: 128 rows.
    """
    if dtype.itemsize > 2:
        return BackwardTiles(64, 16, min(64, power_of_two(D)), 8, 2)
    wide = -D % 256 < 128  # 256 features at a time waste no more than 128 do
    if not wide:
        return BackwardTiles(128, 32, min(128, power_of_two(D)), 8, 3)
    if dtype == torch.bfloat16 and capability[0] == 9:
        return BackwardTiles(128, 32, 256, 8, 2)
    long = dtype == torch.float16 and source_length > 64
    return BackwardTiles(64, 64 if long else 32, 256, 8, 2)


def two_terms(dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether the kernel can split coefficients: in bf16; and in fp16 on sm_100, where it does not,
    but Triton 3.9 fails on a loop of one product that loads ahead."""
    return dtype == torch.bfloat16 or (dtype == torch.float16 and capability[0] == 10)


def row_tiles(side: Side) -> TileList:
    """All positions up to each sequence's last valid one, in tiles of 16."""
    slots = -(-side.features.shape[1] // 16)
    return tile_list((side.ends + 15) // 16, torch.zeros_like(side.ends), slots, slots, 1, 0)


def source_steps(side: Side, step: int) -> tuple[TileList, TileList]:
    """The same positions in steps of `step` and, where 16 are enough for what is left of a
    sequence, one of 16."""
    length = side.features.shape[1]
    slots, unit = -(-length // 16), step // 16
    long = (side.ends + step - 1 - min(16, step - 16)) // step
    rest = (side.ends > long * step).int()
    zero = torch.zeros_like(long)
    return (
        tile_list(long, zero, -(-length // step), slots, unit, 0),
        tile_list(rest, long * unit, 1, slots, unit, 0),
    )


def backward(
    grads: Pair,
    image: Tensor,
    text: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    argmax: Pair,
    d_image: Tensor,
    d_text: Tensor,
) -> None:
    """Add the gradients of image and text to fp32 `d_image` and `d_text`."""
    images, texts = Side.of(image, patch_mask), Side.of(text, token_mask)
    with on_device(image):
        _add(d_image, images, texts, argmax, grads, 0)
        _add(d_text, texts, images, (argmax[1], argmax[0]), (grads[1], grads[0]), 1)


def _add(out: Tensor, p: Side, q: Side, indices: Pair, grads: Pair, p_axis: int) -> None:
    """Add the gradient of side p, sums of features of side q.

    Args:
        indices, grads: what positions of p and of q have chosen, and the gradients of the scores
            that are means over p's and q's positions.
        p_axis: the place of p's sequences among the axes of both, 0 or 1.
    """
    (P, p_length, D), (Q, q_length, _) = p.features.shape, q.features.shape
    q_axis, dtype, (capability, _) = 1 - p_axis, q.features.dtype, device_limits(out.device)
    tiles = backward_tiles(D, dtype, capability, q_length)
    rows, (long, short) = row_tiles(p), source_steps(q, tiles.step)
    p_grad, q_grad = (g if p_axis == 0 else g.t() for g in grads)  # [P, Q]
    some = q.counts > 0
    of_q = torch.where(some, q_grad / q.counts.clamp(min=1), 0.0)
    # Coefficients are divided by an upper bound of them, so that they keep their bits in fp16.
    scale = torch.where(some, p_grad, 0.0).abs().amax(1) / p.counts.clamp(min=1)
    scale = (scale + of_q.abs().amax(1)).clamp_(min=1e-30)
    q_weight = (of_q / scale[:, None]).contiguous()
    p_slots, q_slots = -(-p_length // 16), -(-q_length // 16)
    # In the features' precision: in fp32 the last step needs more registers than there are.
    part = torch.zeros_like(p.features)
    programs = math.ceil(P * p_slots / (tiles.rows // 16)), math.ceil(D / tiles.features)
    launcher(gradient_kernel, programs)(
        part, p.mask, rows.code, rows.first, p.counts, scale, q.features, q.mask, long.code,
        long.first, short.code, short.first, *indices, p_grad, q_weight,
        indices[0].stride(p_axis), indices[0].stride(q_axis),
        indices[1].stride(p_axis), indices[1].stride(q_axis), *p_grad.stride(),
        P, Q, p_length, q_length, p_slots, q_slots, 2 if dtype == torch.bfloat16 else 1, D=D,
        BD=tiles.features, ROWS=tiles.rows, LONG=tiles.step, P_MASKED=p.masked,
        Q_MASKED=q.masked, TWO_TERMS=two_terms(dtype, capability), STAGES=tiles.stages,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    out += part


@triton.jit
def _indices(here, p, live, r, r_inside, p_win, q_win, p_grad, q_weight, p_factor, Q,
             p_win_p, p_win_q, q_win_p, q_win_q, grad_p, grad_q, Q_LEN, q_slots,
             STEP: tl.constexpr):  # fmt: skip
    """What one step of the source needs: indices in P [16, R] and in Q [R, STEP], and their
    coefficients [R]."""
    q = (here // q_slots).to(tl.int64)
    s = here % q_slots * 16 + tl.arange(0, STEP)
    p_won = tl.load(p_win + (p * p_win_p + q * p_win_q)[None, :] + r, mask=r_inside, other=0)
    p_share = tl.load(p_grad + p * grad_p + q * grad_q, mask=live, other=0.0) * p_factor
    inside = live[:, None] & (s < Q_LEN)[None, :]
    q_won = tl.load(q_win + (p * q_win_p + q * q_win_q)[:, None] + s[None, :], mask=inside, other=0)
    q_share = tl.load(q_weight + p * Q + q, mask=live, other=0.0)
    return p_won.to(tl.int32), q_won.to(tl.int32), p_share, q_share


@triton.jit
def _add_steps(acc, code, total, terms, source, q_mask, d, p, live, r, r_inside, p_win, q_win,
               p_grad, q_weight, p_factor, Q, p_win_p, p_win_q, q_win_p, q_win_q,
               grad_p, grad_q, Q_LEN, q_slots, D: tl.constexpr, ROWS: tl.constexpr,
               STEP: tl.constexpr, Q_MASKED: tl.constexpr,
               TWO_TERMS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    dtype = acc.dtype
    here = tl.load(code)
    p_won, q_won, p_share, q_share = _indices(
        here, p, live, r, r_inside, p_win, q_win, p_grad, q_weight, p_factor, Q,
        p_win_p, p_win_q, q_win_p, q_win_q, grad_p, grad_q, Q_LEN, q_slots,
        STEP)  # fmt: skip
    for t in tl.range(0, total, num_stages=STAGES):
        s = here % q_slots * 16 + tl.arange(0, STEP)
        row = (here // q_slots).to(tl.int64) * Q_LEN + s
        s_ok = s < Q_LEN
        # What a masked position holds, NaN included, must not meet even a zero coefficient.
        if Q_MASKED:
            s_ok = tl.load(q_mask + row, mask=s_ok, other=0) != 0
        x = tl.load(
            source + row[:, None] * D + d[None, :], mask=s_ok[:, None] & (d[None, :] < D), other=0.0
        )

        g = tl.where(p_won[:, :, None] == s[None, None, :], p_share[None, :, None], 0.0)
        g += tl.where(q_won[None, :, :] == r[:, :, None], q_share[None, :, None], 0.0)
        g = tl.reshape(g, [ROWS, STEP])

        # The next step's indices are loaded before this one's products, which hide their
        # latency.
        here = tl.load(code + t + 1)
        p_won, q_won, p_share, q_share = _indices(
            here, p, live, r, r_inside, p_win, q_win, p_grad, q_weight, p_factor, Q,
            p_win_p, p_win_q, q_win_p, q_win_q, grad_p, grad_q, Q_LEN, q_slots,
            STEP)  # fmt: skip

        main = g.to(source.dtype.element_ty)
        acc = tl.dot(main, x, acc, input_precision="ieee", out_dtype=dtype)
        if TWO_TERMS:  # noqa: SIM102 - decided when compiled; the next one must not be
            # A branch the compiler cannot resolve: of two products in one block it would take the
            # second for a product of the first's result, as in attention, and give each warp all
            # columns and more registers than there are.
            if terms > 1:
                rest = (g - main.to(dtype)).to(source.dtype.element_ty)
                acc = tl.dot(rest, x, acc, input_precision="ieee", out_dtype=dtype)
    return acc


VARYING = ["p_win_p", "p_win_q", "q_win_p", "q_win_q", "grad_p", "grad_q", "P", "Q", "terms"]


@triton.jit(do_not_specialize=VARYING)
def gradient_kernel(
    out,  # [P, P_LEN, D] zeros; rows in no tile stay so
    p_mask,  # [P, P_LEN], not read unless P_MASKED
    p_code,  # [tiles + 1] int32, sequence * p_slots + first position / 16
    p_first,  # [P + 1] int32; the last is the number of tiles
    p_count,  # [P] int32, valid positions
    scale,  # [P] an upper bound of |coefficient| in each sequence's rows
    source,  # [Q, Q_LEN, D]
    q_mask,  # [Q, Q_LEN], not read unless Q_MASKED
    long_code,  # steps of the source of LONG positions, as p_code
    long_first,
    short_code,  # steps of 16 positions
    short_first,
    p_win,  # [P, Q, P_LEN] (in some order): position in q that wins position in p
    q_win,  # [P, Q, Q_LEN] (in some order): position in p that wins position in q
    p_grad,  # [P, Q] (in some order): gradient of the score averaged over p's positions
    q_weight,  # [P, Q], of the one averaged over q's: divided by scale and by q's positions
    p_win_p,  # stride of p_win from one sequence p to the next
    p_win_q,  # from one sequence q to the next
    q_win_p,
    q_win_q,
    grad_p,
    grad_q,
    P,
    Q,
    P_LEN,
    Q_LEN,
    p_slots,
    q_slots,
    terms,  # products a coefficient is split into: 2 in bf16, 1 otherwise
    D: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
    LONG: tl.constexpr,
    P_MASKED: tl.constexpr,
    Q_MASKED: tl.constexpr,
    TWO_TERMS: tl.constexpr,  # only with terms = 2
    STAGES: tl.constexpr,
):
    R: tl.constexpr = ROWS // 16
    tiles = tl.load(p_first + P)
    if tl.program_id(0) * R >= tiles:
        return
    dtype = scale.dtype.element_ty
    tile = tl.program_id(0) * R + tl.arange(0, R)
    live = tile < tiles
    here = tl.load(p_code + tile, mask=live, other=0)
    p = (here // p_slots).to(tl.int64)  # [R]
    r = (here % p_slots * 16)[None, :] + tl.arange(0, 16)[:, None]  # [16, R]
    r_inside = live[None, :] & (r < P_LEN)
    size = tl.load(scale + p)
    p_factor = 1.0 / (size * tl.maximum(tl.load(p_count + p), 1))
    d = tl.program_id(1) * BD + tl.arange(0, BD)

    acc = tl.zeros([ROWS, BD], dtype)
    acc = _add_steps(
        acc, long_code, tl.load(long_first + Q), terms, source, q_mask, d, p, live, r, r_inside,
        p_win, q_win, p_grad, q_weight, p_factor, Q, p_win_p, p_win_q, q_win_p,
        q_win_q, grad_p, grad_q, Q_LEN, q_slots, D, ROWS, LONG, Q_MASKED, TWO_TERMS,
        STAGES)  # fmt: skip
    acc = _add_steps(
        acc, short_code, tl.load(short_first + Q), terms, source, q_mask, d, p, live, r, r_inside,
        p_win, q_win, p_grad, q_weight, p_factor, Q, p_win_p, p_win_q, q_win_p,
        q_win_q, grad_p, grad_q, Q_LEN, q_slots, D, ROWS, 16, Q_MASKED, TWO_TERMS,
        STAGES)  # fmt: skip

    row = p[None, :] * P_LEN + r
    r_ok = r_inside
    if P_MASKED:
        r_ok = tl.load(p_mask + row, mask=r_inside, other=0) != 0
    acc *= tl.reshape(tl.broadcast_to(size[None, :], [16, R]), [ROWS])[:, None]
    to = out + tl.reshape(row, [ROWS])[:, None] * D + d[None, :]
    keep = tl.reshape(r_ok, [ROWS])[:, None] & (d[None, :] < D)
    tl.store(to, acc.to(out.dtype.element_ty), mask=keep)
