"""The forward pass of the Triton backend: one tile product feeds the maxima of both directions, or
of the texts' alone.

The similarities stay on the chip. A program owns a block of ROWS patches of one image and walks
over the tiles of a group of texts. Where D fits, the block is loaded once and stays in shared
memory while the texts stream past: about 200 FLOP per byte read, against 40 for a program per pair.
An image of one block writes its scores directly; an image of several blocks leaves the sum of its
row maxima and its column maxima to `combine_kernel`.

Shape legend: I images, J texts, N patches, M text positions (padded), D features;
BLOCKS = ceil(N / ROWS).
"""

from ds_cmli.cmli.triton.library import tl, triton

NO_INDEX = tl.constexpr(0x7FFFFFFF)
# ROWS is a power of two because Triton's tensors are, so N=196 runs as 256: 31% of the products are
# padding. As 128 + 64 + 16 it would be 6%, but the three products then share one warp layout on
# sm_80 (each warp reads all of the image: 8 times the shared memory traffic), or, kept apart by
# branches, each stages its part through shared memory again for every tile; on sm_90 the tiles of S
# are converted between layouts through shared memory. Both cost more than the padding.


# Sizes that change with the batch select no compilation.
@triton.jit(
    do_not_specialize=[
        *("score_stride", "i2t_stride", "t2i_stride", "code_stride", "first_stride"),
        *("J", "unit", "last"),
    ]
)
def forward_kernel(
    s_i2t,  # [I, J] scores; several blocks: [I, BLOCKS, J] sums of the row maxima
    s_t2i,  # [I, J] scores; several blocks: [I, BLOCKS, J, M] column maxima
    arg_i2t,  # [I, J, N] uint8 or int16, untouched unless SAVE
    arg_t2i,  # [I, J, M], several blocks: [I, BLOCKS, J, M]
    image,  # [I, N, D]
    text,  # [J, M, D]
    image_mask,  # [I, N], not read unless MASKED
    token_mask,  # [J, M]
    image_count,  # [I] int32, valid patches
    text_count,  # [J] int32, valid tokens
    suspect,  # [1] int32: some input may give a NaN
    first,  # int32: the first tile of each group of texts, see `tiles.Walk`
    code,  # [tiles + 1] int32, text * slots + place in the text; J * slots after the last
    score_stride,  # elements from one image to the next in s_i2t; in s_t2i too, unless in blocks
    i2t_stride,
    t2i_stride,
    code_stride,
    first_stride,
    J,
    N,
    M,
    slots,
    unit,
    last,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BD: tl.constexpr,  # features a product takes at a time
    BLOCKS: tl.constexpr,
    MASKED: tl.constexpr,
    SAVE: tl.constexpr,
    STAGES: tl.constexpr,
    BOTH: tl.constexpr = True,  # otherwise s_i2t and arg_i2t are untouched
):
    i = (tl.program_id(0) // BLOCKS).to(tl.int64)
    block = tl.program_id(0) % BLOCKS
    of_group = first + i * first_stride
    group_start = tl.program_id(1) * unit
    begin = tl.load(of_group + group_start)
    end = tl.load(of_group + tl.minimum(group_start + unit, last))
    if begin == end:
        return
    dtype = s_i2t.dtype.element_ty
    LOW = float("-inf")

    n = block * ROWS + tl.arange(0, ROWS)
    n_inside = n < N
    n_ok = n_inside
    if MASKED:
        n_ok = tl.load(image_mask + i * N + n, mask=n_inside, other=0) != 0
    d = tl.arange(0, BD)
    patches = image + i * N * D + n[:, None] * D + d[None, :]
    resident = tl.load(patches, mask=n_inside[:, None] & (d[None, :] < D), other=0.0)  # [ROWS, BD]
    n_count = tl.load(image_count + i)
    check = tl.load(suspect) != 0
    c = tl.arange(0, TOKENS)

    best = tl.full([ROWS], LOW, dtype)
    best_m = tl.zeros([ROWS], tl.int32)
    columns = tl.zeros([], dtype)
    poison = tl.zeros([], dtype)
    code += i * code_stride
    for t in tl.range(begin, end, num_stages=STAGES):
        here = tl.load(code + t)
        j = (here // slots).to(tl.int64)
        m = here % slots * TOKENS + c
        m_inside = m < M
        m_ok = tl.load(token_mask + j * M + m, mask=m_inside, other=0) != 0
        tokens = text + j * M * D + m[:, None] * D + d[None, :]
        w = tl.load(tokens, mask=m_inside[:, None] & (d[None, :] < D), other=0.0)  # [TOKENS, BD]
        s = tl.dot(resident, tl.trans(w), input_precision="ieee", out_dtype=dtype)  # [ROWS, TOKENS]
        if BD < D:
            for k in range(BD, D, BD):
                k_ok = k + d[None, :] < D
                v = tl.load(patches + k, mask=n_inside[:, None] & k_ok, other=0.0)
                w = tl.load(tokens + k, mask=m_inside[:, None] & k_ok, other=0.0)
                s = tl.dot(v, tl.trans(w), s, input_precision="ieee", out_dtype=dtype)

        # A maximum of the hardware passes over NaN. S can hold one only where an input is NaN,
        # infinite or huge: only then is it looked for.
        if check:
            bad = (s != s) & n_ok[:, None] & m_ok[None, :]
            is_bad = tl.max(tl.max(bad.to(tl.int32), 1), 0) > 0
            poison = tl.where(is_bad, float("nan"), poison)

        # The index of a maximum is found by equality afterwards: fewer instructions than carrying
        # it along, and the lowest one wins a tie.
        if BOTH:
            over_m = tl.where(m_ok[None, :], s, LOW)
            row = tl.max(over_m, 1)
            if SAVE:
                row_m = tl.min(tl.where(over_m == row[:, None], m[None, :], NO_INDEX), 1)
                best_m = tl.where(row > best, row_m, best_m)
            best = tl.maximum(best, row)

        over_n = tl.where(n_ok[:, None], s, LOW)
        column = tl.max(over_n, 0)
        if SAVE:
            column_n = tl.min(tl.where(over_n == column[None, :], n[:, None], NO_INDEX), 0)
            column_n = tl.minimum(column_n, N - 1).to(arg_t2i.dtype.element_ty)
            if BLOCKS == 1:
                tl.store(arg_t2i + i * t2i_stride + j * M + m, column_n, mask=m_inside)
            else:
                tl.store(arg_t2i + ((i * BLOCKS + block) * J + j) * M + m, column_n, mask=m_inside)
        if BLOCKS == 1:
            columns += tl.sum(tl.where(m_ok, column, 0.0), 0)
        else:
            tl.store(s_t2i + ((i * BLOCKS + block) * J + j) * M + m, column + poison, mask=m_inside)

        if tl.load(code + t + 1) // slots != j:  # the text ends with this tile
            if BOTH:
                rows = tl.sum(tl.where(n_ok, best, 0.0), 0) + poison
                if BLOCKS == 1:
                    tl.store(s_i2t + i * score_stride + j, rows / tl.maximum(n_count, 1))
                else:
                    tl.store(s_i2t + (i * BLOCKS + block) * J + j, rows)
            if BLOCKS == 1:
                mean = (columns + poison) / tl.load(text_count + j)
                tl.store(s_t2i + i * score_stride + j, tl.where(n_count > 0, mean, 0.0))
            if SAVE and BOTH:
                tl.store(
                    arg_i2t + i * i2t_stride + j * N + n,
                    best_m.to(arg_i2t.dtype.element_ty),
                    mask=n_inside,
                )
            best = tl.full([ROWS], LOW, dtype)
            columns = tl.zeros([], dtype)
            poison = tl.zeros([], dtype)


@triton.jit(do_not_specialize=["score_stride", "t2i_stride", "kept_stride", "J"])
def combine_kernel(
    s_i2t,  # [I, J] out
    s_t2i,  # [I, J] out
    arg_t2i,  # [I, J, M] out
    row_sum,  # [I, BLOCKS, J]
    column_max,  # [I, BLOCKS, J, M]
    column_arg,  # [I, BLOCKS, J, M]
    token_mask,  # [J, M]
    image_count,  # [I]
    text_count,  # [J]
    kept,  # [I, J] uint8: the pairs whose blocks were computed; not read unless KEPT
    score_stride,
    t2i_stride,
    kept_stride,
    J,
    M,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    SAVE: tl.constexpr,
    KEPT: tl.constexpr,
    BOTH: tl.constexpr = True,
):
    """Scores of one pair from the results of the image's blocks, taken in order: the first of
    equals stays."""
    i = tl.program_id(0).to(tl.int64) // J
    j = tl.program_id(0).to(tl.int64) % J
    m_count = tl.load(text_count + j)
    n_count = tl.load(image_count + i)
    if m_count == 0:
        return  # no tile was computed; the zeros of the outputs stay
    if KEPT:  # noqa: SIM102  # alone it decides when the kernel is compiled
        if tl.load(kept + i * kept_stride + j) == 0:
            return
    dtype = s_i2t.dtype.element_ty
    m = tl.arange(0, WIDTH)
    ok = tl.load(token_mask + j * M + m, mask=m < M, other=0) != 0
    best = tl.full([WIDTH], float("-inf"), dtype)
    best_n = tl.zeros([WIDTH], tl.int32)
    rows = tl.zeros([], dtype)
    for block in range(BLOCKS):
        pair = (i * BLOCKS + block) * J + j
        if BOTH:
            rows += tl.load(row_sum + pair)
        column = tl.load(column_max + pair * M + m, mask=ok, other=0.0)
        better = (column > best) | (column != column)
        if SAVE:
            column_n = tl.load(column_arg + pair * M + m, mask=ok, other=0).to(tl.int32)
            best_n = tl.where(better, column_n, best_n)
        best = tl.where(better, column, best)
    if SAVE:
        tl.store(arg_t2i + i * t2i_stride + j * M + m, best_n.to(arg_t2i.dtype.element_ty), mask=ok)
    if BOTH:
        tl.store(s_i2t + i * score_stride + j, rows / tl.maximum(n_count, 1))
    columns = tl.sum(tl.where(ok, best, 0.0), 0)
    tl.store(s_t2i + i * score_stride + j, tl.where(n_count > 0, columns / m_count, 0.0))


@triton.jit(do_not_specialize=["n"])
def suspect_kernel(found, x, n, huge, WIDTH: tl.constexpr):
    """Set `found` [1] to 1 if one of WIDTH elements of x [n] is NaN or larger than `huge`."""
    place = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    value = tl.load(x + place, mask=place < n, other=0.0)
    bad = tl.where(tl.abs(value.to(tl.float32)) <= huge, 0, 1)
    # Programs that write at the same time write the same.
    tl.store(found, 1, mask=tl.max(bad, 0) > 0)
