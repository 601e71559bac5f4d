"""The Triton backward kernel: one product a side with matrices made from argmax indices.

    d_image[i, n] = sum_j  g_i2t[i,j]/N_i * text[j, a(i,j,n)]
                  + sum_{j, m: b(i,j,m) = n} g_t2i[i,j]/M_j * text[j, m]
    d_text[j, m]  = sum_i  g_t2i[i,j]/M_j * image[i, b(i,j,m)]
                  + sum_{i, n: a(i,j,n) = m} g_i2t[i,j]/N_i * image[i, n]

a, b are the best token and the best patch, N_i and M_j count valid positions. Both lines are one
formula with the roles changed, so there is one kernel: P is the side of the gradient, Q the
source's. A program owns ROWS rows of the gradient, adds up over all of Q in a fixed order and
writes each row once: no atomics, the same bits every time. Its rows are the next ROWS/16 tiles of
16 positions, whichever sequences they belong to; the source comes in long steps and, for what is
left of a sequence, steps of 16. So neither N=196 nor short texts waste products.

Shapes: P, Q sequences of a side; D features; of a program R tiles, ROWS = 16 R, STEP of the source.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .sides import Sides, TensorPair, power_of_two
from .triton_forward import Side, TileList, device_limits, launch, tile_list, tl, triton


class BackwardTiles(NamedTuple):
    rows: int  # of the gradient, in a program
    step: int  # source positions of a product
    features: int
    warps: int
    stages: int


def backward_tiles(
    D: int, dtype: torch.dtype, capability: tuple[int, int], source_length: int
) -> BackwardTiles:
    """Tiles for one device, of rows that gather from sequences of `source_length` positions.

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


def source_steps(side: Side, step: int) -> tuple[TileList, TileList]:
    """All positions up to each sequence's last valid one in steps of `step` and, where 16 are
    enough for what is left of a sequence, one of 16."""
    length = side.features.shape[1]
    slots, unit = -(-length // 16), step // 16
    long = (side.ends + step - 1 - min(16, step - 16)) // step
    rest = (side.ends > long * step).int()
    of_long = tile_list(long, -(-length // step), slots, unit)
    return of_long, tile_list(rest, 1, slots, unit, start=long * unit)


def backward(sides: Sides, grads: TensorPair, argmax: TensorPair, d_sides: TensorPair) -> None:
    """Add the gradients of image and text to those given, fp32."""
    images, texts = Side.of(sides.image, sides.patch_mask), Side.of(sides.text, sides.token_mask)
    _add(d_sides[0], images, texts, argmax, grads, 0)
    _add(d_sides[1], texts, images, (argmax[1], argmax[0]), (grads[1], grads[0]), 1)


def _add(
    out: Tensor, p: Side, q: Side, indices: TensorPair, grads: TensorPair, p_axis: int
) -> None:
    """Add the gradient of side p: sums of features of side q. In a pair p is first if p_axis is 0.

    indices, grads: what positions of p and of q have chosen, and the gradients of the scores that
    are means over p's and q's positions.
    """
    (P, p_length, D), (Q, q_length, _) = p.features.shape, q.features.shape
    dtype, (capability, _) = q.features.dtype, device_limits(out.device)
    tiles = backward_tiles(D, dtype, capability, q_length)
    slots = -(-p_length // 16)
    rows, (long, short) = tile_list((p.ends + 15) // 16, slots, slots), source_steps(q, tiles.step)
    p_grad, q_grad = (g if p_axis == 0 else g.t() for g in grads)  # [P, Q]
    some = q.counts > 0
    of_q = torch.where(some, q_grad / q.counts.clamp(min=1), 0.0)
    # Coefficients are divided by an upper bound of them, so that they keep their bits in fp16.
    scale = torch.where(some, p_grad, 0.0).abs().amax(1) / p.counts.clamp(min=1)
    scale = (scale + of_q.abs().amax(1)).clamp_(min=1e-30)
    q_weight = of_q / scale[:, None]
    q_weight = (q_weight if p_axis == 0 else q_weight.t()).contiguous()  # [I, J], as p_grad
    # In the features' precision: in fp32 the last step needs more registers than there are.
    part = torch.zeros_like(p.features)
    programs = -(-P * slots // (tiles.rows // 16)), -(-D // tiles.features)
    launch(
        gradient_kernel, programs,
        part, p.mask, rows.code, rows.first, p.counts, scale, q.features, q.mask, long.code,
        long.first, short.code, short.first, *indices, p_grad, q_weight, *p_grad.stride(), P, Q,
        p_length, q_length, slots, long.slots, 2 if dtype == torch.bfloat16 else 1, D=D,
        BD=tiles.features, ROWS=tiles.rows, LONG=tiles.step, P_MASKED=p.masked, Q_MASKED=q.masked,
        TWO_TERMS=two_terms(dtype, capability), STAGES=tiles.stages, num_warps=tiles.warps,
        num_stages=tiles.stages,
    )  # fmt: skip
    out += part


@triton.jit
def _indices(here, rows, chosen, Q_LEN, q_slots, STEP: tl.constexpr):
    """What one step of the source needs: indices in P [16, R] and in Q [R, STEP], and their
    coefficients [R]."""
    p, live, r, r_inside, p_factor, P_LEN = rows
    p_win, q_win, p_grad, q_weight, p_step, q_step = chosen
    s = here % q_slots * 16 + tl.arange(0, STEP)
    pair = p * p_step + (here // q_slots).to(tl.int64) * q_step
    p_won = tl.load(p_win + (pair * P_LEN)[None, :] + r, mask=r_inside, other=0)
    p_share = tl.load(p_grad + pair, mask=live, other=0.0) * p_factor
    inside = live[:, None] & (s < Q_LEN)[None, :]
    q_won = tl.load(q_win + (pair * Q_LEN)[:, None] + s[None, :], mask=inside, other=0)
    q_share = tl.load(q_weight + pair, mask=live, other=0.0)
    return p_won.to(tl.int32), q_won.to(tl.int32), p_share, q_share


@triton.jit
def _add_steps(acc, code, total, terms, source, q_mask, d, rows, chosen, Q_LEN, q_slots,
               D: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, Q_MASKED: tl.constexpr,
               TWO_TERMS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Add the products of `total` steps of STEP source positions."""
    r = rows[2]
    here = tl.load(code)
    p_won, q_won, p_share, q_share = _indices(here, rows, chosen, Q_LEN, q_slots, STEP)
    for t in tl.range(0, total, num_stages=STAGES):
        s = here % q_slots * 16 + tl.arange(0, STEP)
        row = (here // q_slots).to(tl.int64) * Q_LEN + s
        s_ok = s < Q_LEN
        # What a masked position holds, NaN included, must not meet even a zero coefficient.
        if Q_MASKED:
            s_ok = tl.load(q_mask + row, mask=s_ok, other=0) != 0
        place = row[:, None] * D + d[None, :]
        x = tl.load(source + place, mask=s_ok[:, None] & (d[None, :] < D), other=0.0)

        g = tl.where(p_won[:, :, None] == s[None, None, :], p_share[None, :, None], 0.0)
        g += tl.where(q_won[None, :, :] == r[:, :, None], q_share[None, :, None], 0.0)
        g = tl.reshape(g, [ROWS, STEP])

        # The next step's indices are loaded before this step's products, which hide that.
        here = tl.load(code + t + 1)
        p_won, q_won, p_share, q_share = _indices(here, rows, chosen, Q_LEN, q_slots, STEP)

        main = g.to(source.dtype.element_ty)
        acc = tl.dot(main, x, acc, input_precision="ieee")
        if TWO_TERMS:  # noqa: SIM102 - decided when compiled; the next one must not be
            # A branch the compiler cannot resolve: of two products in one block it would take the
            # second for a product of the first's result, as in attention, and give each warp all
            # columns and more registers than there are.
            if terms > 1:
                rest = (g - main.to(tl.float32)).to(source.dtype.element_ty)
                acc = tl.dot(rest, x, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["p_step", "q_step", "P", "Q", "terms"])
def gradient_kernel(
    out, p_mask, p_code, p_first, p_count, scale, source, q_mask, long_code, long_first, short_code,
    short_first, p_win, q_win, p_grad, q_weight, p_step, q_step, P, Q, P_LEN, Q_LEN, p_slots,
    q_slots, terms, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, LONG: tl.constexpr,
    P_MASKED: tl.constexpr, Q_MASKED: tl.constexpr, TWO_TERMS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the gradient out [P, P_LEN, D], zeros before: those in no tile stay so.

    p_mask [P, P_LEN] and q_mask [Q, Q_LEN] are not read unless P_MASKED, Q_MASKED. p_code and
    p_first are a `TileList` of p's rows; long and short ones are of the steps of source [Q, Q_LEN,
    D]. p_count [P] are valid positions, scale [P] bounds the |coefficient| of a sequence's rows.

    Of each pair, the element p * p_step + q * q_step: p_win [.., P_LEN] is the position in q that
    one in p has chosen, and q_win [.., Q_LEN] the reverse; p_grad is the gradient of the mean over
    p's positions, and q_weight that of the mean over q's, divided by these and by scale. terms: a
    coefficient is the sum of so many products, 2 in bf16 (only if TWO_TERMS).
    """
    R: tl.constexpr = ROWS // 16
    tiles = tl.load(p_first + P)
    if tl.program_id(0) * R >= tiles:
        return
    tile = tl.program_id(0) * R + tl.arange(0, R)
    live = tile < tiles
    here = tl.load(p_code + tile, mask=live, other=0)
    p = (here // p_slots).to(tl.int64)  # [R]
    r = (here % p_slots * 16)[None, :] + tl.arange(0, 16)[:, None]  # [16, R]
    r_inside = live[None, :] & (r < P_LEN)
    size = tl.load(scale + p)
    p_factor = 1.0 / (size * tl.maximum(tl.load(p_count + p), 1))
    d = tl.program_id(1) * BD + tl.arange(0, BD)

    rows = p, live, r, r_inside, p_factor, P_LEN
    chosen = p_win, q_win, p_grad, q_weight, p_step, q_step
    acc = tl.zeros([ROWS, BD], tl.float32)
    steps = tl.load(long_first + Q)
    acc = _add_steps(acc, long_code, steps, terms, source, q_mask, d, rows, chosen, Q_LEN, q_slots,
                     D, ROWS, LONG, Q_MASKED, TWO_TERMS, STAGES)  # fmt: skip
    steps = tl.load(short_first + Q)
    acc = _add_steps(acc, short_code, steps, terms, source, q_mask, d, rows, chosen, Q_LEN, q_slots,
                     D, ROWS, 16, Q_MASKED, TWO_TERMS, STAGES)  # fmt: skip

    row = p[None, :] * P_LEN + r
    r_ok = r_inside
    if P_MASKED:
        r_ok = tl.load(p_mask + row, mask=r_inside, other=0) != 0
    acc *= tl.reshape(tl.broadcast_to(size[None, :], [16, R]), [ROWS])[:, None]
    to = out + tl.reshape(row, [ROWS])[:, None] * D + d[None, :]
    keep = tl.reshape(r_ok, [ROWS])[:, None] & (d[None, :] < D)
    tl.store(to, acc.to(out.dtype.element_ty), mask=keep)
