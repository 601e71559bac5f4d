"""The sparse backward pass of the Triton backend: each row gathers what it won and what won it.

    d_p[p, r] = sum_q w_p[p, q] * source[q, p_win(p, q, r)]
              + sum_{q, s: q_win(p, q, s) = r} w_q[p, q] * source[q, s]

The names are those of `backward_kernel`, which computes the same by products with matrices of
argmax positions; here the work is a row of features for each index. Pairs whose two score
gradients are both exactly 0 are left out of both sums. For the second one `sort_kernel` brings
the positions of Q into lists, one for each tile of 16 rows of P, by a stable counting sort. Each
sum has a fixed order and each row one program: no atomics, the same bits every time. The last two
kernels end at once where `sparse` says that the dense one runs (`gradient.py` chooses).

Shape legend: P, Q sequences of the two sides; D features; TILES the power of two from
P_LEN / 16 on.
"""

from ds_cmli.cmli.triton.library import tl, triton


@triton.jit
def _of_pairs(p, q, Q, q_count, p_grad, q_grad, grad_p, grad_q):
    """Valid positions of the sequences q, and the score gradients of their pairs with p: 0 where
    there are none."""
    count = tl.load(q_count + q, mask=q < Q, other=0)
    pair = p * grad_p + q.to(tl.int64) * grad_q
    of_p = tl.load(p_grad + pair, mask=count > 0, other=0.0)
    of_q = tl.load(q_grad + pair, mask=count > 0, other=0.0)
    return count, of_p, of_q


# Sizes that change with the batch select no compilation.
@triton.jit(do_not_specialize=["grad_p", "grad_q", "Q"])
def pairs_kernel(
    scale,  # [P] out: an upper bound of |coefficient| in each sequence's rows
    kept,  # [P, Q] int32 out: the sequences of Q of the kept pairs, in order
    kept_count,  # [P] int32 out
    p_weight,  # [P, Q] out: w_p / scale of the kept pairs, in order
    q_weight,  # [P, Q] out: w_q / scale, at q
    p_count,  # [P] int32, valid positions
    q_count,  # [Q]
    p_grad,  # [P, Q] (in some order)
    q_grad,
    grad_p,
    grad_q,
    Q,
    WIDTH: tl.constexpr,
):
    """List the pairs of one sequence of P that are not left out, and their coefficients."""
    p = tl.program_id(0).to(tl.int64)
    dtype = scale.dtype.element_ty
    p_valid = tl.load(p_count + p)
    most_p, most_q = tl.zeros([], dtype), tl.zeros([], dtype)
    for start in range(0, Q, WIDTH):
        q = start + tl.arange(0, WIDTH)
        count, of_p, of_q = _of_pairs(p, q, Q, q_count, p_grad, q_grad, grad_p, grad_q)
        most_p = tl.maximum(most_p, tl.max(tl.abs(of_p), 0))
        most_q = tl.maximum(most_q, tl.max(tl.abs(of_q) / tl.maximum(count, 1), 0))
    most = most_p / tl.maximum(p_valid, 1) + most_q
    most = tl.where(most == 0, 1.0, tl.maximum(most, 1e-30))
    tl.store(scale + p, most)

    p_factor = 1.0 / (most * tl.maximum(p_valid, 1))
    total = tl.zeros([], tl.int32)
    for start in range(0, Q, WIDTH):
        q = start + tl.arange(0, WIDTH)
        count, of_p, of_q = _of_pairs(p, q, Q, q_count, p_grad, q_grad, grad_p, grad_q)
        keep = (((of_p != 0) | (of_q != 0)) & (p_valid > 0)).to(tl.int32)
        at = p * Q + total + tl.cumsum(keep, 0) - 1
        tl.store(kept + at, q, mask=keep != 0)
        tl.store(p_weight + at, of_p * p_factor, mask=keep != 0)
        tl.store(q_weight + p * Q + q, of_q / (most * tl.maximum(count, 1)), mask=q < Q)
        total += tl.sum(keep, 0)
    tl.store(kept_count + p, total)


@triton.jit(do_not_specialize=["win_p", "win_q", "Q"])
def sort_kernel(
    counts,  # [P, SEGMENTS, TILES] int32: positions of each segment in each tile; out unless FILL
    lists,  # [P, Q * Q_LEN] int32, out if FILL: (q << bits | s) * 16 + row in the tile
    starts,  # [P, TILES + 1] int32, out if FILL: where the list of each tile begins
    sparse,  # [1] int32
    kept,
    kept_count,
    q_win,
    q_mask,
    win_p,
    win_q,
    Q,
    Q_LEN,
    bits,
    FILL: tl.constexpr,
    SEGMENTS: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Count the positions that fell to each tile of p in one segment of its kept pairs; if FILL,
    write them, tile after tile and in the order of Q."""
    if tl.load(sparse) == 0:
        return
    p = tl.program_id(0).to(tl.int64)
    here = tl.program_id(1)
    kept_pairs = tl.load(kept_count + p)
    per = tl.cdiv(kept_pairs, SEGMENTS)
    tile = tl.arange(0, TILES)
    at = tl.zeros([TILES], tl.int32)
    if FILL:
        segment = tl.arange(0, SEGMENTS)[:, None]
        every = tl.load(counts + (p * SEGMENTS + segment) * TILES + tile[None, :])
        sums = tl.sum(every, 0)
        first = tl.cumsum(sums, 0) - sums
        at = first + tl.sum(tl.where(segment < here, every, 0), 0)
        if here == 0:
            tl.store(starts + p * (TILES + 1) + tile, first)
            tl.store(starts + p * (TILES + 1) + TILES, tl.sum(sums, 0))
    for k in range(here * per, tl.minimum(here * per + per, kept_pairs)):
        q = tl.load(kept + p * Q + k).to(tl.int64)
        for start in range(0, Q_LEN, WIDTH):
            s = start + tl.arange(0, WIDTH)
            ok = s < Q_LEN
            if MASKED:
                ok = tl.load(q_mask + q * Q_LEN + s, mask=ok, other=0) != 0
            won = tl.load(q_win + p * win_p + q * win_q + s, mask=ok, other=0).to(tl.int32)
            of_tile = tl.where(ok, won // 16, TILES)
            mine = (of_tile[:, None] == tile[None, :]).to(tl.int32)  # [WIDTH, TILES]
            if FILL:
                place = tl.sum(mine * (at[None, :] + tl.cumsum(mine, 0) - 1), 1)
                entry = ((q.to(tl.int32) << bits) + s) * 16 + won % 16
                tl.store(lists + p * Q * Q_LEN + place, entry, mask=ok)
            at += tl.sum(mine, 0)
    if not FILL:
        tl.store(counts + (p * SEGMENTS + here) * TILES + tile, at)


@triton.jit(do_not_specialize=["win_p", "win_q", "Q"])
def sparse_gradient_kernel(
    out,  # [P, P_LEN, D] zeros; rows that no pair reaches stay so
    sparse,
    p_mask,  # [P, P_LEN], not read unless P_MASKED
    p_ends,  # [P] int32, last valid position + 1
    scale,
    source,  # [Q, Q_LEN, D]
    p_win,
    kept,
    kept_count,
    p_weight,
    q_weight,
    lists,
    starts,
    win_p,
    win_q,
    Q,
    P_LEN,
    Q_LEN,
    bits,
    blocks,  # ceil(P_LEN / 16)
    D: tl.constexpr,
    BD: tl.constexpr,
    STEP: tl.constexpr,
    UNROLL: tl.constexpr,
    TILES: tl.constexpr,
    P_MASKED: tl.constexpr,
    TWO_TERMS: tl.constexpr,
    P_WINS: tl.constexpr = True,  # otherwise p_win is not read, and p has gathered nothing
    Q_WINS: tl.constexpr = True,  # otherwise there are no lists
):
    if tl.load(sparse) == 0:
        return
    p = (tl.program_id(0) // blocks).to(tl.int64)
    tile = tl.program_id(0) % blocks
    total = tl.load(kept_count + p)
    if (total == 0) | (tile * 16 >= tl.load(p_ends + p)):
        return
    dtype = scale.dtype.element_ty
    row = tl.arange(0, 16)
    r = tile * 16 + row
    inside = r < P_LEN
    d = tl.arange(0, BD)
    if D > BD:
        d += tl.program_id(1) * BD
    d_ok = (d < D)[None, :]
    features = source + d[None, :]
    readable = tl.minimum(r, P_LEN - 1)

    # What each row has won in each sequence of Q.
    acc = tl.zeros([16, BD], dtype)
    if P_WINS:
        for start in range(0, total, UNROLL):
            for u in tl.static_range(UNROLL):
                k = tl.minimum(start + u, total - 1)
                q = tl.load(kept + p * Q + k).to(tl.int64)
                weight = tl.where(start + u < total, tl.load(p_weight + p * Q + k), 0.0)
                won = tl.load(p_win + p * win_p + q * win_q + readable).to(tl.int32)
                x = tl.load(features + q * Q_LEN * D + won[:, None] * D, mask=d_ok, other=0.0)
                acc += x.to(dtype) * weight

    # What has won these rows: a matrix of coefficients [16, STEP] times the listed positions.
    if Q_WINS:
        begin = tl.load(starts + p * (TILES + 1) + tile)
        end = tl.load(starts + p * (TILES + 1) + tile + 1)
        other = tl.zeros([16, BD], dtype)
        for k in range(begin, end, STEP):
            e = k + tl.arange(0, STEP)
            entry = tl.load(lists + p * Q * Q_LEN + tl.minimum(e, end - 1))
            q = entry >> (bits + 4)
            s = (entry >> 4) - (q << bits)
            at = q.to(tl.int64) * Q_LEN + s
            x = tl.load(features + at[:, None] * D, mask=d_ok, other=0.0)
            weight = tl.load(q_weight + p * Q + q, mask=e < end, other=0.0)
            g = tl.where((entry % 16)[None, :] == row[:, None], weight[None, :], 0.0)
            main = g.to(source.dtype.element_ty)
            other = tl.dot(main, x, other, input_precision="ieee", out_dtype=dtype)
            if TWO_TERMS:
                rest = (g - main.to(dtype)).to(source.dtype.element_ty)
                other = tl.dot(rest, x, other, input_precision="ieee", out_dtype=dtype)
        acc += other

    ok = inside
    if P_MASKED:
        ok = tl.load(p_mask + p * P_LEN + r, mask=inside, other=0) != 0
    to = out + (p * P_LEN + r)[:, None] * D + d[None, :]
    result = acc * tl.load(scale + p)
    tl.store(to, result.to(out.dtype.element_ty), mask=ok[:, None] & d_ok)
