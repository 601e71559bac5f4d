"""The Triton forward kernel: one tile product feeds the maxima of both directions.

The similarities stay on the chip. A program owns a block of ROWS patches of one image and walks
over the tiles of a group of texts. Where D fits, the block is loaded once and stays in shared
memory while the texts stream past: about 200 FLOP per byte read, against 40 for a program per pair.
An image of one block writes its scores directly; an image of several blocks leaves the sum of its
row maxima and its column maxima to `combine_kernel`.

Products are fp32 sums of 16-bit products on tensor cores, plain fp32 for fp32 (never TF32). Nothing
is tuned at run time and nothing is added atomically: the same input gives the same bits on the same
kind of GPU.

Shapes: I images, J texts, N patches, M text positions (padded), D features; X sequences of a side.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion

from .op import Pair, has_data

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        # A build of torch for CPUs brings none, and predicts the memory on a GPU all the same: it
        # chooses tiles and allocates, and starts no kernel.
        brought = {"2.13": "3.7.1", "2.14": "3.8.0"}  # by the builds of torch for GPUs

        def _unchanged(kernel: Callable | None = None, **_: object) -> Callable:
            return _unchanged if kernel is None else kernel

        release = ".".join(torch.__version__.split(".")[:2])
        triton = SimpleNamespace(jit=_unchanged, __version__=brought.get(release, "3.9.0"))
        tl = SimpleNamespace(constexpr=lambda value: value)

LEAST_CAPABILITY = (8, 0)
TEXTS_PER_PROGRAM = 64  # an image block, loaded once for so many, is under 5% of the loads
HUGE = 2.0**50  # products of smaller inputs cannot overflow fp32, and so give no NaN by themselves
PARTIAL_BYTES = 64 * 2**20  # for the partial maxima of images of more than one block


class ForwardTiles(NamedTuple):
    rows: int  # patches a program holds
    # Tile widths, ascending: a text takes the smallest that holds it, or several of the last.
    tokens: tuple[int, ...]
    features: int  # features a product takes at a time
    warps: int
    stages: int


def power_of_two(n: int) -> int:
    """The least power of two that is at least n and at least 16, the smallest side of a product."""
    return max(16, 1 << (n - 1).bit_length())


def forward_tiles(
    N: int, M: int, D: int, dtype: torch.dtype, capability: tuple[int, int], shared: int
) -> ForwardTiles:
    """Tiles for one device. Chosen from sizes that do not change between steps, never by timing:
    same input, same bits.

    `shared` is the shared memory a block may use: 163 KB on sm_80, 227 KB on sm_90, 99 KB on sm_86,
    sm_89 and sm_120. 16-bit inputs: an image's block stays resident and 8 warps read it from shared
    memory, which leaves the registers to S and its maxima (ROWS=256, D=256: 131 KB and 80 to 231
    registers). sm_90 reads the texts from shared memory too, so it needs the tile in use and the
    one in flight; earlier ones hold the tile in use in registers, where a tile of 64 by 256
    rows comes too close to the 255 there are. 99 KB of shared memory hold 128 rows. fp32 runs
    on plain multiply-adds, limited by arithmetic: small tiles, features in turn.
    """
    widths = [width for width in (16, 32, 64) if width < 2 * M or width == 16]
    if dtype.itemsize > 2:
        return ForwardTiles(min(128, power_of_two(N)), tuple(w for w in widths if w < 64), 16, 8, 3)
    if D > 256:
        return ForwardTiles(min(128, power_of_two(N)), tuple(widths), 64, 8, 3)
    rows, features = min(256, power_of_two(N)), power_of_two(D)
    buffers = 2 if capability[0] == 9 else 1
    scratch = 2304  # what reductions and layout changes were seen to take at most

    def fitting(rows: int) -> tuple[int, ...]:
        width = 64 if capability[0] >= 9 or rows < 256 else 32
        need = [(rows + buffers * w) * features * dtype.itemsize + scratch for w in widths]
        return tuple(
            w for w, bytes_ in zip(widths, need, strict=True) if w <= width and bytes_ <= shared
        )

    while rows > 16 and len(fitting(rows)) < min(2, len(widths)):
        rows //= 2
    return ForwardTiles(rows, fitting(rows) or (16,), features, 8 if rows > 64 else 4, 2)


def unsuited(capability: tuple[int, int]) -> str | None:
    """Why GPUs of a compute capability do not run the kernels that this Triton compiles.

    None if they do, as far as is known: `tests/cmli/test_triton_compile.py` compiles them.
    """
    named = ".".join(map(str, capability))
    if capability < LEAST_CAPABILITY:
        return f"the kernels need compute capability 8.0 or later, this GPU has {named}"
    # Its tensor memory: 16-bit forward kernels do not compile, and fp32 gradients are of TF32.
    if capability[0] == 10 and TorchVersion(triton.__version__) < "3.9":
        return (
            f"Triton {triton.__version__} does not compile the kernels for compute capability "
            f"{named} (3.9 does), and rounds fp32 to TF32 there"
        )
    return None


def device_limits(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability, and bytes of shared memory of a block; an sm_80's where there is no
    GPU."""
    if not torch.cuda.is_available():
        return (8, 0), 163 * 1024
    properties = torch.cuda.get_device_properties(device)
    most = properties.shared_memory_per_block
    shared = getattr(properties, "shared_memory_per_block_optin", most)
    return (properties.major, properties.minor), shared


def launcher(kernel: Callable, grid: tuple[int, ...]) -> Callable[..., None]:
    """What starts a kernel; with tensors without data it starts nothing, and compiles nothing."""

    def start(*arguments: object, **options: object) -> None:
        if has_data(arguments[0]):  # type: ignore[arg-type]
            kernel[grid](*arguments, **options)  # type: ignore[index]

    return start


def on_device(x: Tensor) -> AbstractContextManager:
    # Triton launches on the current device, which need not be the tensors'.
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


class Side(NamedTuple):
    """Images or texts, with the lengths and masks of their positions."""

    features: Tensor  # [X, L, D]
    # int16: Triton sizes the registers of a product by the narrowest type its operands depend on.
    mask: Tensor  # [X, L], not read unless `masked`
    counts: Tensor  # [X] int32, valid positions
    ends: Tensor  # [X] int32, last valid position + 1
    masked: bool

    @classmethod
    def of(cls, features: Tensor, mask: Tensor | None) -> "Side":
        features, (X, L, _) = features.contiguous(), features.shape
        if mask is None:
            counts = torch.full((X,), L, dtype=torch.int32, device=features.device)
            return cls(features, counts, counts, counts, False)
        numbers = torch.arange(1, L + 1, dtype=torch.int32, device=features.device)
        ends = (mask * numbers).amax(1)
        mask = mask.to(torch.int16, memory_format=torch.contiguous_format)
        return cls(features, mask, mask.sum(1, dtype=torch.int32), ends, True)

    def part(self, x: slice) -> "Side":
        return Side(self.features[x], self.mask[x], self.counts[x], self.ends[x], self.masked)


class TileList(NamedTuple):
    """Tiles, sequence after sequence: `code[t] = sequence * slots + place`, places counted in tiles
    or in 16 positions."""

    code: Tensor  # [bound + 1] int32
    first: Tensor  # [X + 1] int32: the sequence's first tile; the last entry is their number


def tile_list(
    count: Tensor, start: Tensor, most: int, slots: int, unit: int, after: int
) -> TileList:
    """List `count` [X] tiles of each sequence, each `unit` places after the one before.

    Args:
        start: [X] int64, the place of a sequence's first tile.
        most: how many tiles a sequence can have.
        after: the code after the last tile.
    """
    first = F.pad(count.cumsum(0, dtype=torch.int32), (1, 0))
    tile = torch.arange(len(count) * most + 1, dtype=torch.int32, device=count.device)
    sequence = torch.searchsorted(first[1:], tile, right=True, out_int32=True)
    here = sequence.clamp(max=len(count) - 1)
    code = here * slots + start[here] + (tile - first[here]) * unit
    return TileList(torch.where(sequence < len(count), code, after).int(), first)


def text_tiles(ends: Tensor, longest: int, widths: tuple[int, ...]) -> list[tuple[TileList, int]]:
    """The tiles of the texts that take each tile width, and how many of them a text can have."""
    lists, above, J = [], 0, len(ends)
    for width in widths:
        # Longer texts than the last width take several tiles of it.
        own = ends > above if width == widths[-1] else (ends > above) & (ends <= width)
        most = -(-longest // width) if width == widths[-1] else 1
        count = torch.where(own, (ends + width - 1) // width, 0)
        tiles = tile_list(count, torch.zeros_like(count), most, most, 1, J * most)
        lists.append((tiles, most))
        above = width
    return lists


def forward(
    image: Tensor,
    text: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    scores: Pair,
    argmax: Pair | None,
) -> None:
    """Write scores [I, J], zeros before, and argmax indices [I, J, N] and [I, J, M].

    Where nothing is computed (padding, empty texts) indices are not written, nor read.
    """
    images, texts = Side.of(image, patch_mask), Side.of(text, token_mask)
    (I, N, D), (J, M, _) = image.shape, text.shape  # noqa: E741
    tiles = forward_tiles(N, M, D, image.dtype, *device_limits(image.device))
    suspect = _suspect(images.features) | _suspect(texts.features)
    save, blocks = argmax is not None, math.ceil(N / tiles.rows)
    arg_i2t, arg_t2i = argmax or scores  # stand in for pointers that are not written
    i_step, j_step = I, J
    if blocks > 1:
        pairs = max(1, PARTIAL_BYTES // (blocks * (4 + M * (4 + arg_t2i.itemsize))))
        i_step, j_step = max(1, min(I, pairs // J)), min(J, pairs)
    with on_device(image):
        for j in range(0, J, j_step):
            of_texts = texts.part(slice(j, j + j_step))
            lists = text_tiles(of_texts.ends, M, tiles.tokens)
            for i in range(0, I, i_step):
                of_images = images.part(slice(i, i + i_step))
                part = [x[i : i + i_step, j : j + j_step] for x in (*scores, arg_i2t, arg_t2i)]
                _launch(of_images, of_texts, part, lists, tiles, blocks, suspect, save)


def _launch(
    images: Side,
    texts: Side,
    out: list[Tensor],
    lists: list[tuple[TileList, int]],
    tiles: ForwardTiles,
    blocks: int,
    suspect: Tensor,
    save: bool,
) -> None:
    (I, N, D), (J, M, _) = images.features.shape, texts.features.shape  # noqa: E741
    s_i2t, s_t2i, arg_i2t, arg_t2i = out
    rows, columns, column_arg = s_i2t, s_t2i, arg_t2i
    if blocks > 1:
        rows, columns = s_i2t.new_empty(I, blocks, J), s_i2t.new_empty(I, blocks, J, M)
        column_arg = arg_t2i.new_empty((I, blocks, J, M) if save else (0,))
    masks = images.mask, texts.mask, images.counts, texts.counts
    strides = s_t2i.stride(0), arg_i2t.stride(0), arg_t2i.stride(0)
    for width, (tile, slots) in zip(tiles.tokens, lists, strict=True):
        launcher(forward_kernel, (I * blocks, math.ceil(J / TEXTS_PER_PROGRAM)))(
            rows, columns, arg_i2t, column_arg, images.features, texts.features, *masks, suspect,
            tile.first, tile.code, *strides, J, N, M, slots, TEXTS=TEXTS_PER_PROGRAM, D=D,
            ROWS=tiles.rows, TOKENS=width, BD=tiles.features, BLOCKS=blocks, MASKED=images.masked,
            SAVE=save, STAGES=tiles.stages, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    if blocks > 1:
        launcher(combine_kernel, (I * J,))(
            s_i2t, s_t2i, arg_t2i, rows, columns, column_arg, texts.mask, images.counts,
            texts.counts, s_t2i.stride(0), arg_t2i.stride(0), J, M, BLOCKS=blocks,
            WIDTH=power_of_two(M), SAVE=save,
        )  # fmt: skip


def _suspect(x: Tensor) -> Tensor:
    """Whether products of these features may give a NaN: one element, on the device."""
    low, high = x.aminmax()
    return ~((low >= -HUGE) & (high <= HUGE))  # a NaN is neither


NO_INDEX = tl.constexpr(0x7FFFFFFF)
# ROWS is a power of two because Triton's tensors are, so N=196 runs as 256: 31% of the products are
# padding. As 128 + 64 + 16 it would be 6%, but the three products then share one warp layout on
# sm_80 (each warp reads all of the image: 8 times the shared memory traffic), or, kept apart by
# branches, each stages its part through shared memory again for every tile; on sm_90 the tiles of S
# are converted between layouts through shared memory. Both cost more than the padding.


# Sizes that change with the batch select no compilation.
@triton.jit(do_not_specialize=["score_stride", "i2t_stride", "t2i_stride", "J"])
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
    suspect,  # [] bool: some input may give a NaN
    first,  # [J + 1] int32: the first tile of each text
    code,  # [tiles + 1] int32, text * slots + place in the text; J * slots after the last
    score_stride,  # elements from one image to the next in s_i2t; in s_t2i too, unless in blocks
    i2t_stride,
    t2i_stride,
    J,
    N,
    M,
    slots,
    TEXTS: tl.constexpr,  # of a program
    D: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BD: tl.constexpr,  # features a product takes at a time
    BLOCKS: tl.constexpr,
    MASKED: tl.constexpr,
    SAVE: tl.constexpr,
    STAGES: tl.constexpr,
):
    i = (tl.program_id(0) // BLOCKS).to(tl.int64)
    block = tl.program_id(0) % BLOCKS
    group = tl.program_id(1) * TEXTS
    begin = tl.load(first + group)
    end = tl.load(first + tl.minimum(group + TEXTS, J))
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
            rows = tl.sum(tl.where(n_ok, best, 0.0), 0) + poison
            if BLOCKS == 1:
                tl.store(s_i2t + i * score_stride + j, rows / tl.maximum(n_count, 1))
                mean = (columns + poison) / tl.load(text_count + j)
                tl.store(s_t2i + i * score_stride + j, tl.where(n_count > 0, mean, 0.0))
            else:
                tl.store(s_i2t + (i * BLOCKS + block) * J + j, rows)
            if SAVE:
                tl.store(
                    arg_i2t + i * i2t_stride + j * N + n,
                    best_m.to(arg_i2t.dtype.element_ty),
                    mask=n_inside,
                )
            best = tl.full([ROWS], LOW, dtype)
            columns = tl.zeros([], dtype)
            poison = tl.zeros([], dtype)


@triton.jit(do_not_specialize=["score_stride", "t2i_stride", "J"])
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
    score_stride,
    t2i_stride,
    J,
    M,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    SAVE: tl.constexpr,
):
    """Scores of one pair from the results of the image's blocks, taken in order: the first of
    equals stays."""
    i = tl.program_id(0).to(tl.int64) // J
    j = tl.program_id(0).to(tl.int64) % J
    m_count = tl.load(text_count + j)
    n_count = tl.load(image_count + i)
    if m_count == 0:
        return  # no tile was computed; the zeros of the outputs stay
    dtype = s_i2t.dtype.element_ty
    m = tl.arange(0, WIDTH)
    ok = tl.load(token_mask + j * M + m, mask=m < M, other=0) != 0
    best = tl.full([WIDTH], float("-inf"), dtype)
    best_n = tl.zeros([WIDTH], tl.int32)
    rows = tl.zeros([], dtype)
    for block in range(BLOCKS):
        pair = (i * BLOCKS + block) * J + j
        rows += tl.load(row_sum + pair)
        column = tl.load(column_max + pair * M + m, mask=ok, other=0.0)
        better = (column > best) | (column != column)
        if SAVE:
            column_n = tl.load(column_arg + pair * M + m, mask=ok, other=0).to(tl.int32)
            best_n = tl.where(better, column_n, best_n)
        best = tl.where(better, column, best)
    if SAVE:
        tl.store(arg_t2i + i * t2i_stride + j * M + m, best_n.to(arg_t2i.dtype.element_ty), mask=ok)
    tl.store(s_i2t + i * score_stride + j, rows / tl.maximum(n_count, 1))
    columns = tl.sum(tl.where(ok, best, 0.0), 0)
    tl.store(s_t2i + i * score_stride + j, tl.where(n_count > 0, columns / m_count, 0.0))
