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

from .sides import Directions, SidePair, Sides, has_data, power_of_two
from .triton_forward import Sequences, TileList, device_limits, tile_list, tl, triton


class BackwardTiles(NamedTuple):
    rows: int  # of the gradient, in a program
    step: int  # source positions of a product
    features: int
    warps: int
    stages: int


def backward_tiles(
    D: int, dtype: torch.dtype, capability: tuple[int, int], source_length: int
) -> BackwardTiles:
    """Choose tiles for one device, of rows that gather from sequences of `source_length` positions.

    Counted in the compiled kernels, 64 rows of 256 features take 21 to 42% fewer instructions a
    product than 128 x 128: each coefficient is made once for all features. fp16 takes steps of 64
    where the source is longer than that, as steps of 32 waste less on short texts. On sm_90 the two
    groups of warps would each make all coefficients of 64 rows, and spill in bf16: 128 rows.
    """
    if dtype.itemsize > 2:
        return BackwardTiles(64, 16, min(64, power_of_two(D)), warps=8, stages=2)
    wide = -D % 256 < 128  # 256 features at a time waste no more than 128 do
    if not wide:
        return BackwardTiles(128, 32, min(128, power_of_two(D)), warps=8, stages=3)
    if dtype == torch.bfloat16 and capability[0] == 9:
        return BackwardTiles(128, 32, 256, warps=8, stages=2)
    step = 64 if dtype == torch.float16 and source_length > 64 else 32
    return BackwardTiles(64, step, 256, warps=8, stages=2)


def source_steps(source: Sequences, step: int) -> tuple[TileList, TileList]:
    """List the positions up to each sequence's last valid one: in long steps, and the remainders.

    A remainder is what 16 positions are enough for; its list has one step of 16.
    """
    length = source.features.shape[1]
    slots = -(-length // 16)
    unit = step // 16
    num_long = (source.ends + step - 1 - min(16, step - 16)) // step
    has_remainder = (source.ends > num_long * step).int()
    long_steps = tile_list(num_long, -(-length // step), slots, unit)
    return long_steps, tile_list(has_remainder, 1, slots, place=num_long * unit)


def backward(sides: Sides, d_scores: Directions, argmax: Directions, d_sides: SidePair) -> None:
    images = Sequences.measured(sides.image, sides.patch_mask)
    texts = Sequences.measured(sides.text, sides.token_mask)
    d_image, d_text = d_sides
    d_i2t, d_t2i = d_scores
    token_argmax, patch_argmax = argmax
    add_gradient(d_image, images, texts, (token_argmax, patch_argmax), (d_i2t, d_t2i), p_axis=0)
    add_gradient(d_text, texts, images, (patch_argmax, token_argmax), (d_t2i, d_i2t), p_axis=1)


def add_gradient(
    out: Tensor,
    p: Sequences,
    q: Sequences,
    argmax: tuple[Tensor, Tensor],
    d_means: tuple[Tensor, Tensor],
    p_axis: int,
) -> None:
    """Add the gradient of p, this side, to `out`: sums of features of q, the other side.

    `argmax` are the choices of p's and of q's positions; `d_means` [I, J] the gradients of the
    scores that are means over these. `p_axis` is 0 if p are the images.
    """
    P, p_length, D = p.features.shape
    Q, q_length, _ = q.features.shape
    dtype = q.features.dtype
    capability, _ = device_limits(out.device)
    tiles = backward_tiles(D, dtype, capability, q_length)
    slots = -(-p_length // 16)
    rows = tile_list((p.ends + 15) // 16, slots, slots)
    long_steps, short_steps = source_steps(q, tiles.step)
    p_argmax, q_argmax = argmax
    d_p_mean, d_q_mean = (d if p_axis == 0 else d.t() for d in d_means)  # [P, Q]
    q_has_positions = q.counts > 0
    q_coefficient = torch.where(q_has_positions, d_q_mean / q.counts.clamp(min=1), 0.0)
    # Coefficients are divided by an upper bound of them, so that they keep their bits in fp16.
    bound = torch.where(q_has_positions, d_p_mean, 0.0).abs().amax(1) / p.counts.clamp(min=1)
    bound = (bound + q_coefficient.abs().amax(1)).clamp_(min=1e-30)
    q_weight = q_coefficient / bound[:, None]
    q_weight = (q_weight if p_axis == 0 else q_weight.t()).contiguous()  # [I, J], as d_p_mean
    # Coefficients are split into two terms in bf16. On sm_100 the kernel is compiled for it in fp16
    # too, where Triton 3.9 fails on a loop of one product that loads ahead.
    can_split = dtype == torch.bfloat16 or (dtype == torch.float16 and capability[0] == 10)
    # In the features' precision: in fp32 the last step needs more registers than there are.
    part = torch.zeros_like(p.features)
    if has_data(out):
        with torch.cuda.device_of(out):  # Triton starts kernels on the current GPU
            gradient_kernel[-(-P * slots // (tiles.rows // 16)), -(-D // tiles.features)](
                part, p.mask, rows.code, rows.first, p.counts, bound, q.features, q.mask,
                long_steps.code, long_steps.first, short_steps.code, short_steps.first, p_argmax,
                q_argmax, d_p_mean, q_weight, *d_p_mean.stride(), P, Q, p_length, q_length, slots,
                long_steps.slots, 2 if dtype == torch.bfloat16 else 1, D=D, BD=tiles.features,
                ROWS=tiles.rows, LONG=tiles.step, P_MASKED=p.masked, Q_MASKED=q.masked,
                TWO_TERMS=can_split, STAGES=tiles.stages, num_warps=tiles.warps,
                num_stages=tiles.stages,
            )  # fmt: skip
    out += part


@triton.jit
def load_choices(code, rows, choices, Q_LEN, q_slots, STEP: tl.constexpr):
    """Load what one step of the source needs.

    Returns what the rows have chosen [16, R], what the step's positions have chosen [R, STEP], and
    the coefficients of both [R].
    """
    p, live, r, r_inside, p_factor, P_LEN = rows
    p_argmax, q_argmax, d_p_mean, q_weight, p_step, q_step = choices
    s = code % q_slots * 16 + tl.arange(0, STEP)
    pair = p * p_step + (code // q_slots).to(tl.int64) * q_step
    p_choice = tl.load(p_argmax + (pair * P_LEN)[None, :] + r, mask=r_inside, other=0)
    p_coefficient = tl.load(d_p_mean + pair, mask=live, other=0.0) * p_factor
    s_inside = live[:, None] & (s < Q_LEN)[None, :]
    q_choice = tl.load(q_argmax + (pair * Q_LEN)[:, None] + s[None, :], mask=s_inside, other=0)
    q_coefficient = tl.load(q_weight + pair, mask=live, other=0.0)
    return p_choice.to(tl.int32), q_choice.to(tl.int32), p_coefficient, q_coefficient


@triton.jit
def add_products(acc, codes, num_steps, terms, source, q_mask, d, rows, choices, Q_LEN, q_slots,
                 D: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, Q_MASKED: tl.constexpr,
                 TWO_TERMS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Add the products of steps of STEP source positions to acc, and return it."""
    r = rows[2]
    code = tl.load(codes)
    p_choice, q_choice, p_coefficient, q_coefficient = load_choices(
        code, rows, choices, Q_LEN, q_slots, STEP
    )
    for t in tl.range(0, num_steps, num_stages=STAGES):
        s = code % q_slots * 16 + tl.arange(0, STEP)
        row = (code // q_slots).to(tl.int64) * Q_LEN + s
        s_ok = s < Q_LEN
        # The features of a masked position, NaN included, must not meet even a zero coefficient.
        if Q_MASKED:
            s_ok = tl.load(q_mask + row, mask=s_ok, other=0) != 0
        place = row[:, None] * D + d[None, :]
        x = tl.load(source + place, mask=s_ok[:, None] & (d[None, :] < D), other=0.0)

        g = tl.where(p_choice[:, :, None] == s[None, None, :], p_coefficient[None, :, None], 0.0)
        g += tl.where(q_choice[None, :, :] == r[:, :, None], q_coefficient[None, :, None], 0.0)
        g = tl.reshape(g, [ROWS, STEP])

        # The next step's indices are loaded before this step's products, which hide that.
        code = tl.load(codes + t + 1)
        p_choice, q_choice, p_coefficient, q_coefficient = load_choices(
            code, rows, choices, Q_LEN, q_slots, STEP
        )

        main = g.to(source.dtype.element_ty)
        acc = tl.dot(main, x, acc, input_precision="ieee")
        if TWO_TERMS:  # noqa: SIM102 - decided when compiled; the next one must not be
            # A branch the compiler cannot resolve: of two products in one block it would take the
            # second for a product of the first's result, as in attention, and give each warp all
            # columns and more registers than there are.
            if terms > 1:
                second = (g - main.to(tl.float32)).to(source.dtype.element_ty)
                acc = tl.dot(second, x, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["p_step", "q_step", "P", "Q", "terms"])
def gradient_kernel(
    out, p_mask, p_code, p_first, p_count, bound, source, q_mask, long_code, long_first, short_code,
    short_first, p_argmax, q_argmax, d_p_mean, q_weight, p_step, q_step, P, Q, P_LEN, Q_LEN,
    p_slots, q_slots, terms, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
    LONG: tl.constexpr, P_MASKED: tl.constexpr, Q_MASKED: tl.constexpr, TWO_TERMS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Write ROWS rows of the gradient out [P, P_LEN, D], zeros before: those in no tile stay so.

    p_mask [P, P_LEN] and q_mask [Q, Q_LEN] are not read unless P_MASKED, Q_MASKED. p_code and
    p_first are a `TileList` of p's rows; long and short ones are of the steps of source [Q, Q_LEN,
    D]. p_count [P] are valid positions, bound [P] bounds the |coefficient| of a sequence's rows.

    Of each pair, the element p * p_step + q * q_step: p_argmax [.., P_LEN] is the position in q
    that one in p has chosen, and q_argmax [.., Q_LEN] the reverse; d_p_mean is the gradient of the
    mean over p's positions, and q_weight that of the mean over q's, divided by these and by bound.
    terms: a coefficient is the sum of so many products, 2 in bf16 (only if TWO_TERMS).
    """
    R: tl.constexpr = ROWS // 16
    num_tiles = tl.load(p_first + P)
    if tl.program_id(0) * R >= num_tiles:
        return
    tile = tl.program_id(0) * R + tl.arange(0, R)
    live = tile < num_tiles
    code = tl.load(p_code + tile, mask=live, other=0)
    p = (code // p_slots).to(tl.int64)  # [R]
    r = (code % p_slots * 16)[None, :] + tl.arange(0, 16)[:, None]  # [16, R]
    r_inside = live[None, :] & (r < P_LEN)
    size = tl.load(bound + p)
    p_factor = 1.0 / (size * tl.maximum(tl.load(p_count + p), 1))
    d = tl.program_id(1) * BD + tl.arange(0, BD)

    rows = p, live, r, r_inside, p_factor, P_LEN
    choices = p_argmax, q_argmax, d_p_mean, q_weight, p_step, q_step
    acc = tl.zeros([ROWS, BD], tl.float32)
    num_steps = tl.load(long_first + Q)
    acc = add_products(acc, long_code, num_steps, terms, source, q_mask, d, rows, choices, Q_LEN,
                       q_slots, D, ROWS, LONG, Q_MASKED, TWO_TERMS, STAGES)  # fmt: skip
    num_steps = tl.load(short_first + Q)
    acc = add_products(acc, short_code, num_steps, terms, source, q_mask, d, rows, choices, Q_LEN,
                       q_slots, D, ROWS, 16, Q_MASKED, TWO_TERMS, STAGES)  # fmt: skip

    row = p[None, :] * P_LEN + r
    r_ok = r_inside
    if P_MASKED:
        r_ok = tl.load(p_mask + row, mask=r_inside, other=0) != 0
    acc *= tl.reshape(tl.broadcast_to(size[None, :], [16, R]), [ROWS])[:, None]
    target = out + tl.reshape(row, [ROWS])[:, None] * D + d[None, :]
    keep = tl.reshape(r_ok, [ROWS])[:, None] & (d[None, :] < D)
    tl.store(target, acc.to(out.dtype.element_ty), mask=keep)
