"""The Triton forward kernel: one tile product feeds the maxima of both directions.

The similarities stay on the chip. A program owns a block of ROWS patches of one image and walks
over the tiles of a group of texts. Where D fits, the block stays in shared memory while the texts
stream past: about 200 FLOP per byte read, against 40 for a program per pair. An image of several
blocks leaves the sum of its row maxima and its column maxima to `combine_kernel`.

Products are fp32 sums of 16-bit products on tensor cores, plain fp32 for fp32 (never TF32). Nothing
is tuned at run time and nothing is added atomically: the same input gives the same bits on the same
kind of GPU.

Shapes: I images, J texts, N patches, M text positions (padded), D features; X sequences of a side.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion

from .sides import Directions, Sides, has_data, power_of_two, slices

try:
    import triton
    import triton.language as tl
except ImportError:
    # A build of torch for CPUs brings no Triton, and predicts the memory on a GPU all the same: it
    # chooses tiles and allocates, and starts no kernel.
    TRITON_OF_TORCH = {"2.13": "3.7.1", "2.14": "3.8.0"}  # by the builds of torch for GPUs

    def _unchanged(kernel: Callable | None = None, **_: object) -> Callable:
        return _unchanged if kernel is None else kernel

    tl: Any = SimpleNamespace(constexpr=lambda x: x)  # type: ignore[no-redef]
    triton: Any = SimpleNamespace(  # type: ignore[no-redef]
        jit=_unchanged, __version__=TRITON_OF_TORCH.get(torch.__version__[:4], "3.9.0")
    )

TEXTS_PER_PROGRAM = 64  # an image block, loaded once for so many, is under 5% of the loads
MAX_SAFE_INPUT = 2.0**50  # products of smaller inputs do not overflow fp32, and so give no NaN
PARTIAL_BYTES = 64 * 2**20  # maxima of images of several blocks, if one image's fit
SCRATCH_SHARED_BYTES = 2304  # the most that reductions and layout changes were seen to take


class ForwardTiles(NamedTuple):
    rows: int  # patches that a program holds
    # Tile widths, ascending: a text takes the smallest that holds it, or several of the last.
    tokens: tuple[int, ...]
    features: int  # features that a product takes at a time
    warps: int
    stages: int


def forward_tiles(
    N: int, M: int, D: int, dtype: torch.dtype, capability: tuple[int, int], shared_bytes: int
) -> ForwardTiles:
    """Choose tiles for one device from sizes that do not change between steps, never by timing.

    So the same input gives the same bits. 16-bit inputs: an image's block stays resident and 8
    warps read it from shared memory, which leaves the registers to S and its maxima (ROWS=256,
    D=256: 131 KB and 80 to 231 registers). sm_90 reads the texts from shared memory too, the tile
    in use and the one in flight; earlier ones hold the tile in use in registers, where one of 64 by
    256 rows comes too close to the 255 there are. fp32 runs on plain multiply-adds, limited by
    arithmetic: small tiles, features in turn.

    Args:
        shared_bytes: the shared memory that a block may use: 163 KB on sm_80, 227 KB on sm_90, and
            99 KB on sm_86, sm_89 and sm_120, which hold 128 rows.
    """
    widths = tuple(width for width in (16, 32, 64) if width < 2 * M or width == 16)
    if dtype.itemsize > 2:
        narrow = tuple(width for width in widths if width < 64)
        return ForwardTiles(min(128, power_of_two(N)), narrow, 16, warps=8, stages=3)
    if D > 256:
        return ForwardTiles(min(128, power_of_two(N)), widths, 64, warps=8, stages=3)
    rows = min(256, power_of_two(N))
    features = power_of_two(D)
    buffers = 2 if capability[0] == 9 else 1

    def fitting_widths(rows: int) -> tuple[int, ...]:
        widest = 64 if capability[0] >= 9 or rows < 256 else 32
        room = (shared_bytes - SCRATCH_SHARED_BYTES) // (features * dtype.itemsize) - rows
        return tuple(width for width in widths if width <= widest and buffers * width <= room)

    while rows > 16 and len(fitting_widths(rows)) < min(2, len(widths)):
        rows //= 2
    tokens = fitting_widths(rows) or (16,)
    return ForwardTiles(rows, tokens, features, warps=8 if rows > 64 else 4, stages=2)


def why_not_capability(capability: tuple[int, int]) -> str | None:
    """Return why GPUs of a compute capability do not run what this Triton compiles, or None."""
    name = ".".join(map(str, capability))
    if capability < (8, 0):
        return f"the kernels need compute capability 8.0 or later, this GPU has {name}"
    # Its tensor memory: 16-bit forward kernels do not compile, and fp32 gradients are of TF32.
    if capability[0] == 10 and TorchVersion(triton.__version__) < "3.9":
        return (
            f"Triton {triton.__version__} does not compile the kernels for compute capability "
            f"{name} (3.9 does), and rounds fp32 to TF32 there"
        )
    return None


def device_limits(device: torch.device) -> tuple[tuple[int, int], int]:
    """Return compute capability and bytes of shared memory of a block; without a GPU an sm_80's."""
    if not torch.cuda.is_available():
        return (8, 0), 163 * 1024
    properties = torch.cuda.get_device_properties(device)
    shared_bytes = getattr(
        properties, "shared_memory_per_block_optin", properties.shared_memory_per_block
    )
    return (properties.major, properties.minor), shared_bytes


def may_give_nan(x: Tensor) -> Tensor:
    """Return whether products of these features may give a NaN: one element, on the device."""
    low, high = x.aminmax()
    return ~((low >= -MAX_SAFE_INPUT) & (high <= MAX_SAFE_INPUT))  # a NaN is neither


class Sequences(NamedTuple):
    """Images or texts, with the lengths and masks of their positions."""

    features: Tensor  # [X, L, D]
    # int16: Triton sizes the registers of a product by the narrowest type its operands depend on.
    mask: Tensor  # [X, L], not read unless `masked`
    counts: Tensor  # [X] int32, valid positions
    ends: Tensor  # [X] int32, last valid position + 1
    masked: bool

    @classmethod
    def measured(cls, features: Tensor, mask: Tensor | None) -> "Sequences":
        features = features.contiguous()
        X, L, _ = features.shape
        if mask is None:
            counts = torch.full((X,), L, dtype=torch.int32, device=features.device)
            return cls(features, counts, counts, counts, False)
        numbers = torch.arange(1, L + 1, dtype=torch.int32, device=features.device)
        ends = (mask * numbers).amax(1)
        mask = mask.to(torch.int16, memory_format=torch.contiguous_format)
        return cls(features, mask, mask.sum(1, dtype=torch.int32), ends, True)

    def part(self, x: slice) -> "Sequences":
        return Sequences(self.features[x], self.mask[x], self.counts[x], self.ends[x], self.masked)


class TileList(NamedTuple):
    """Tiles of sequences, those of one sequence after those of the one before.

    A tile has the code `sequence * slots + place`. Places are counted in tiles or in 16 positions.
    """

    code: Tensor  # [bound + 1] int32; the entries after the last tile hold `end_code`
    first: Tensor  # [X + 1] int32: the sequence's first tile; the last entry is their number
    slots: int  # the codes of one sequence; each place is below


def tile_list(
    counts: Tensor,
    max_count: int,
    slots: int,
    unit: int = 1,
    place: Tensor | None = None,
    end_code: int = 0,
) -> TileList:
    """List the tiles of each sequence: `counts` [X], at most `max_count`.

    A sequence's tiles are at the places 0, `unit`, ..; given `place` [X], its only one is there.
    """
    first = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    bound = len(counts) * max_count
    tile = torch.arange(bound + 1, dtype=torch.int32, device=counts.device)
    sequence = torch.searchsorted(first[1:], tile, right=True, out_int32=True)
    clamped = sequence.clamp(max=len(counts) - 1)
    places = (tile - first[clamped]) * unit if place is None else place[clamped]
    code = clamped * slots + places
    return TileList(torch.where(sequence < len(counts), code, end_code).int(), first, slots)


def text_tiles(ends: Tensor, longest: int, widths: tuple[int, ...]) -> list[TileList]:
    """List, for each tile width, the tiles of the texts that take it (see `ForwardTiles`)."""
    lists = []
    shorter = 0  # the width before: its texts take that
    for width in widths:
        max_end = longest if width == widths[-1] else width
        max_count = -(-max_end // width)
        takes_width = (ends > shorter) & (ends <= max_end)
        counts = torch.where(takes_width, (ends + width - 1) // width, 0)
        lists.append(tile_list(counts, max_count, max_count, end_code=len(ends) * max_count))
        shorter = width
    return lists


def forward(sides: Sides, scores: Directions, argmax: Directions | None) -> None:
    """Score all pairs. No indices are written of padding and empty texts: these are not read."""
    images = Sequences.measured(sides.image, sides.patch_mask)
    texts = Sequences.measured(sides.text, sides.token_mask)
    I, N, D = images.features.shape  # noqa: E741
    J, M, _ = texts.features.shape
    tiles = forward_tiles(N, M, D, sides.image.dtype, *device_limits(sides.image.device))
    num_blocks = -(-N // tiles.rows)  # of an image
    may_have_nan = may_give_nan(images.features) | may_give_nan(texts.features)
    lists = text_tiles(texts.ends, M, tiles.tokens)
    save = argmax is not None
    s_i2t, s_t2i = scores
    # Without argmax indices, scores stand in for pointers that are not written.
    token_argmax, patch_argmax = argmax or scores

    images_at_once = I
    row_results = s_i2t
    column_results = s_t2i
    column_argmax = patch_argmax
    if num_blocks > 1:
        image_bytes = J * num_blocks * (4 + M * (4 + patch_argmax.itemsize))
        images_at_once = min(I, max(1, PARTIAL_BYTES // image_bytes))
        row_results = s_i2t.new_empty(images_at_once, num_blocks, J)
        column_results = s_t2i.new_empty(images_at_once, num_blocks, J, M)
        column_argmax = patch_argmax.new_empty((images_at_once, num_blocks, J, M) if save else (0,))
    if not has_data(s_i2t):
        return
    with torch.cuda.device_of(s_i2t):  # Triton starts kernels on the current GPU
        for i in slices(I, images_at_once):
            part = images.part(i)
            num_images = len(part.ends)
            for width, listed in zip(tiles.tokens, lists, strict=True):
                forward_kernel[num_images * num_blocks, -(-J // TEXTS_PER_PROGRAM)](
                    row_results, column_results, token_argmax[i], column_argmax, part.features,
                    texts.features, part.mask, texts.mask, part.counts, texts.counts, may_have_nan,
                    listed.first, listed.code, J, N, M, listed.slots, TEXTS=TEXTS_PER_PROGRAM, D=D,
                    ROWS=tiles.rows, TOKENS=width, BD=tiles.features, BLOCKS=num_blocks,
                    MASKED=images.masked, SAVE=save, STAGES=tiles.stages, num_warps=tiles.warps,
                    num_stages=tiles.stages,
                )  # fmt: skip
            if num_blocks > 1:
                combine_kernel[(num_images * J,)](
                    s_i2t[i], s_t2i[i], patch_argmax[i], row_results, column_results, column_argmax,
                    texts.mask, part.counts, texts.counts, J, M, BLOCKS=num_blocks,
                    WIDTH=power_of_two(M), SAVE=save,
                )  # fmt: skip


NO_INDEX = tl.constexpr(0x7FFFFFFF)
# ROWS is a power of two as Triton's tensors are, so N=196 runs as 256: 31% of the products are
# padding. As 128 + 64 + 16 it would be 6%, but on sm_80 the three products then share a warp layout
# (8 times the shared memory traffic) or, kept apart by branches, stage their parts again for every
# tile; on sm_90 tiles of S are converted between layouts. Both cost more than the padding.


@triton.jit(do_not_specialize=["J"])  # which changes with the batch: it selects no compilation
def forward_kernel(
    s_i2t, s_t2i, arg_i2t, arg_t2i, image, text, image_mask, token_mask, image_count, text_count,
    may_have_nan, first, code, J, N, M, slots, TEXTS: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, BD: tl.constexpr, BLOCKS: tl.constexpr,
    MASKED: tl.constexpr, SAVE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Score a block of an image against TEXTS texts, BD features at a time.

    Writes the scores s_i2t, s_t2i [I, J]; of several blocks, sums of row maxima [I, BLOCKS, J] and
    column maxima [I, BLOCKS, J, M]. If SAVE, also arg_i2t [I, J, N], uint8 or int16, and arg_t2i
    [I, J, M], of several blocks [I, BLOCKS, J, M]. image_mask [I, N] is not read unless MASKED,
    image_count [I] and text_count [J] are the valid positions, may_have_nan [] is `may_give_nan` of
    the features, first and code are a `TileList`.
    """
    i = (tl.program_id(0) // BLOCKS).to(tl.int64)
    block = tl.program_id(0) % BLOCKS
    group = tl.program_id(1) * TEXTS
    begin = tl.load(first + group)
    end = tl.load(first + tl.minimum(group + TEXTS, J))
    if begin == end:
        return
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
    check_nan = tl.load(may_have_nan) != 0
    c = tl.arange(0, TOKENS)

    best = tl.full([ROWS], LOW, tl.float32)
    best_m = tl.zeros([ROWS], tl.int32)
    columns = tl.zeros([], tl.float32)
    poison = tl.zeros([], tl.float32)
    for t in tl.range(begin, end, num_stages=STAGES):
        code_t = tl.load(code + t)
        j = (code_t // slots).to(tl.int64)
        m = code_t % slots * TOKENS + c
        m_inside = m < M
        m_ok = tl.load(token_mask + j * M + m, mask=m_inside, other=0) != 0
        tokens = text + j * M * D + m[:, None] * D + d[None, :]
        w = tl.load(tokens, mask=m_inside[:, None] & (d[None, :] < D), other=0.0)  # [TOKENS, BD]
        s = tl.dot(resident, tl.trans(w), input_precision="ieee")  # [ROWS, TOKENS]
        if BD < D:
            for k in range(BD, D, BD):
                k_ok = k + d[None, :] < D
                v = tl.load(patches + k, mask=n_inside[:, None] & k_ok, other=0.0)
                w = tl.load(tokens + k, mask=m_inside[:, None] & k_ok, other=0.0)
                s = tl.dot(v, tl.trans(w), s, input_precision="ieee")

        # A maximum of the hardware passes over NaN. S can hold one only where an input is NaN,
        # infinite or huge: only then is it looked for.
        if check_nan:
            is_nan = (s != s) & n_ok[:, None] & m_ok[None, :]
            has_nan = tl.max(tl.max(is_nan.to(tl.int32), 1), 0) > 0
            poison = tl.where(has_nan, float("nan"), poison)

        # The index of a maximum is found by equality afterwards: fewer instructions than carrying
        # it along, and the lowest one wins a tie.
        over_m = tl.where(m_ok[None, :], s, LOW)
        row = tl.max(over_m, 1)
        if SAVE:
            row_m = tl.min(tl.where(over_m == row[:, None], m[None, :], NO_INDEX), 1)
            best_m = tl.where(row > best, row_m, best_m)
        best = tl.maximum(best, row)

        over_n = tl.where(n_ok[:, None], s, LOW)
        column = tl.max(over_n, 0)
        pair = (i * BLOCKS + block) * J + j
        if SAVE:
            column_n = tl.min(tl.where(over_n == column[None, :], n[:, None], NO_INDEX), 0)
            column_n = tl.minimum(column_n, N - 1).to(arg_t2i.dtype.element_ty)
            tl.store(arg_t2i + pair * M + m, column_n, mask=m_inside)
        if BLOCKS == 1:
            columns += tl.sum(tl.where(m_ok, column, 0.0), 0)
        else:
            tl.store(s_t2i + pair * M + m, column + poison, mask=m_inside)

        if tl.load(code + t + 1) // slots != j:  # the text ends with this tile
            rows = tl.sum(tl.where(n_ok, best, 0.0), 0) + poison
            if BLOCKS == 1:
                tl.store(s_i2t + pair, rows / tl.maximum(n_count, 1))
                mean = (columns + poison) / tl.load(text_count + j)
                tl.store(s_t2i + pair, tl.where(n_count > 0, mean, 0.0))
            else:
                tl.store(s_i2t + pair, rows)
            if SAVE:
                chosen = best_m.to(arg_i2t.dtype.element_ty)
                tl.store(arg_i2t + (i * J + j) * N + n, chosen, mask=n_inside)
            best = tl.full([ROWS], LOW, tl.float32)
            columns = tl.zeros([], tl.float32)
            poison = tl.zeros([], tl.float32)


@triton.jit(do_not_specialize=["J"])
def combine_kernel(
    s_i2t, s_t2i, arg_t2i, row_sum, column_max, column_arg, token_mask, image_count, text_count,
    J, M, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Score one pair from the results of the image's blocks, in order: the first of equals stays.

    row_sum is [I, BLOCKS, J], column_max and column_arg [I, BLOCKS, J, M]."""
    pair = tl.program_id(0).to(tl.int64)
    i = pair // J
    j = pair % J
    m_count = tl.load(text_count + j)
    n_count = tl.load(image_count + i)
    if m_count == 0:
        return  # no tile was computed; the zeros of the outputs stay
    m = tl.arange(0, WIDTH)
    ok = tl.load(token_mask + j * M + m, mask=m < M, other=0) != 0
    best = tl.full([WIDTH], float("-inf"), tl.float32)
    best_n = tl.zeros([WIDTH], tl.int32)
    rows = tl.zeros([], tl.float32)
    for block in range(BLOCKS):
        at = (i * BLOCKS + block) * J + j
        rows += tl.load(row_sum + at)
        column = tl.load(column_max + at * M + m, mask=ok, other=0.0)
        better = (column > best) | (column != column)
        if SAVE:
            column_n = tl.load(column_arg + at * M + m, mask=ok, other=0).to(tl.int32)
            best_n = tl.where(better, column_n, best_n)
        best = tl.where(better, column, best)
    if SAVE:
        tl.store(arg_t2i + pair * M + m, best_n.to(arg_t2i.dtype.element_ty), mask=ok)
    tl.store(s_i2t + pair, rows / tl.maximum(n_count, 1))
    columns = tl.sum(tl.where(ok, best, 0.0), 0)
    tl.store(s_t2i + pair, tl.where(n_count > 0, columns / m_count, 0.0))
