"""The backward pass of the Triton backend: one product a side with matrices of argmax positions.

    d_image[i, n] = sum_j  g_i2t[i,j]/N_i * text[j, a(i,j,n)]
                  + sum_{j, m: b(i,j,m) = n} g_t2i[i,j]/M_j * text[j, m]
    d_text[j, m]  = sum_i  g_t2i[i,j]/M_j * image[i, b(i,j,m)]
                  + sum_{i, n: a(i,j,n) = m} g_i2t[i,j]/N_i * image[i, n]

a, b are the winning token and patch (`arg_i2t`, `arg_t2i`), N_i and M_j count valid positions. Both
lines are one formula with the roles changed, so there is one kernel: P is the side of the gradient,
Q the source's. Of the texts' direction alone, each line has only its sum of b (P_WINS or Q_WINS).

A program owns ROWS rows of the gradient, adds up over all of Q in a fixed order and writes each row
once: no atomics, the same bits every time. Rows come in tiles of 16 positions listed over all
sequences, and a program takes the next ROWS/16 tiles whichever sequences they belong to; the source
comes in long steps and, for what is left of a sequence, steps of 16. So neither N=196 nor short
texts waste products.

Shape legend: P, Q sequences of the two sides; D features; in a program R tiles, ROWS = 16 R rows,
STEP source positions.
"""

from ds_cmli.cmli.triton.library import tl, triton


@triton.jit
def _indices(here, p, live, r, r_inside, p_win, q_win, p_grad, q_weight, p_factor, Q,
             p_win_p, p_win_q, q_win_p, q_win_q, grad_p, grad_q, Q_LEN, q_slots,
             STEP: tl.constexpr, P_WINS: tl.constexpr, Q_WINS: tl.constexpr):  # fmt: skip
    """What one step of the source needs: indices in P [16, R] and in Q [R, STEP], and their
    coefficients [R]."""
    q = (here // q_slots).to(tl.int64)
    s = here % q_slots * 16 + tl.arange(0, STEP)
    p_won, q_won, p_share, q_share = r, s[None, :], p_factor, p_factor  # of what is not there
    if P_WINS:
        p_won = tl.load(p_win + (p * p_win_p + q * p_win_q)[None, :] + r, mask=r_inside, other=0)
        p_share = tl.load(p_grad + p * grad_p + q * grad_q, mask=live, other=0.0) * p_factor
    if Q_WINS:
        inside = live[:, None] & (s < Q_LEN)[None, :]
        won = q_win + (p * q_win_p + q * q_win_q)[:, None] + s[None, :]
        q_won = tl.load(won, mask=inside, other=0)
        q_share = tl.load(q_weight + p * Q + q, mask=live, other=0.0)
    return p_won.to(tl.int32), q_won.to(tl.int32), p_share, q_share


@triton.jit
def _add_steps(acc, code, total, terms, source, q_mask, d, p, live, r, r_inside, p_win, q_win,
               p_grad, q_weight, p_factor, Q, p_win_p, p_win_q, q_win_p, q_win_q,
               grad_p, grad_q, Q_LEN, q_slots, D: tl.constexpr, ROWS: tl.constexpr,
               STEP: tl.constexpr, Q_MASKED: tl.constexpr,
               TWO_TERMS: tl.constexpr, STAGES: tl.constexpr,
               P_WINS: tl.constexpr, Q_WINS: tl.constexpr):  # fmt: skip
    dtype = acc.dtype
    here = tl.load(code)
    p_won, q_won, p_share, q_share = _indices(
        here, p, live, r, r_inside, p_win, q_win, p_grad, q_weight, p_factor, Q,
        p_win_p, p_win_q, q_win_p, q_win_q, grad_p, grad_q, Q_LEN, q_slots,
        STEP, P_WINS, Q_WINS)  # fmt: skip
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

        if P_WINS:
            g = tl.where(p_won[:, :, None] == s[None, None, :], p_share[None, :, None], 0.0)
        if P_WINS and Q_WINS:
            g += tl.where(q_won[None, :, :] == r[:, :, None], q_share[None, :, None], 0.0)
        if not P_WINS:
            g = tl.where(q_won[None, :, :] == r[:, :, None], q_share[None, :, None], 0.0)
        g = tl.reshape(g, [ROWS, STEP])

        # The next step's indices are loaded before this one's products, which hide their
        # latency.
        here = tl.load(code + t + 1)
        p_won, q_won, p_share, q_share = _indices(
            here, p, live, r, r_inside, p_win, q_win, p_grad, q_weight, p_factor, Q,
            p_win_p, p_win_q, q_win_p, q_win_q, grad_p, grad_q, Q_LEN, q_slots,
            STEP, P_WINS, Q_WINS)  # fmt: skip

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
    sparse,  # [1] int32, not 0 where the sparse kernels have written `out`
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
    P_WINS: tl.constexpr = True,  # otherwise p_win and p_grad are not read
    Q_WINS: tl.constexpr = True,
):
    if tl.load(sparse) != 0:
        return
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
        STAGES, P_WINS, Q_WINS)  # fmt: skip
    acc = _add_steps(
        acc, short_code, tl.load(short_first + Q), terms, source, q_mask, d, p, live, r, r_inside,
        p_win, q_win, p_grad, q_weight, p_factor, Q, p_win_p, p_win_q, q_win_p,
        q_win_q, grad_p, grad_q, Q_LEN, q_slots, D, ROWS, 16, Q_MASKED, TWO_TERMS,
        STAGES, P_WINS, Q_WINS)  # fmt: skip

    row = p[None, :] * P_LEN + r
    r_ok = r_inside
    if P_MASKED:
        r_ok = tl.load(p_mask + row, mask=r_inside, other=0) != 0
    acc *= tl.reshape(tl.broadcast_to(size[None, :], [16, R]), [ROWS])[:, None]
    to = out + tl.reshape(row, [ROWS])[:, None] * D + d[None, :]
    keep = tl.reshape(r_ok, [ROWS])[:, None] & (d[None, :] < D)
    tl.store(to, acc.to(out.dtype.element_ty), mask=keep)
