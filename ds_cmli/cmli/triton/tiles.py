"""Tile sizes of the Triton kernels, and the lists that tell a program which positions to work on.

Shape legend: X sequences of a side (images or texts), L positions of each, D features.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ds_cmli.cmli.triton.library import tl, triton
from ds_cmli.cmli.without_data import assumed, has_data

BLOCK = 256  # sequences whose tiles a program lists
ENDLESS = 2**30  # longer than any sequence


class ForwardTiles(NamedTuple):
    rows: int  # patches a program holds
    # Tile widths, ascending: a text takes the smallest that holds it, or several of the last.
    tokens: tuple[int, ...]
    features: int  # features a product takes at a time
    warps: int
    stages: int


class BackwardTiles(NamedTuple):
    rows: int  # gradient rows a program owns
    step: int  # source positions a product takes; what is left of a sequence goes in steps of 16
    features: int
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
    rows comes too close to the 255 there are. 99 KB of shared memory hold 128 rows. fp32 and fp64
    run on plain multiply-adds (fp64 on its tensor cores), limited by arithmetic: small tiles,
    features in turn.
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


class Sequences:
    """Lengths and masks of one side. Everything stays on the device: nothing here waits for it."""

    def __init__(self, mask: Tensor | None, sequences: int, length: int, device: torch.device):
        self.sequences, self.length, self.masked = sequences, length, mask is not None
        if mask is None:
            self.counts = torch.full((sequences,), length, dtype=torch.int32, device=device)
            self.ends = self.counts
            self.mask = self.counts  # stands in for a pointer that is not read
        else:
            # int16: Triton sizes the registers of a product by the narrowest type its operands
            # depend on. Contiguous: that is how kernels read it.
            self.mask = mask.to(torch.int16, memory_format=torch.contiguous_format)
            self.counts = torch.empty(sequences, dtype=torch.int32, device=device)
            self.ends = torch.empty_like(self.counts)  # last valid position + 1
            launcher(lengths_kernel, (sequences,))(
                self.counts, self.ends, self.mask, length, WIDTH=power_of_two(length)
            )


@triton.jit
def lengths_kernel(counts, ends, mask, length, WIDTH: tl.constexpr):
    """Count the valid positions of one sequence [WIDTH], and find where the last one ends."""
    x = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, WIDTH)
    valid = tl.load(mask + x * length + place, mask=place < length, other=0).to(tl.int32)
    tl.store(counts + x, tl.sum(valid, 0))
    tl.store(ends + x, tl.max(valid * (place + 1), 0))


class TileList(NamedTuple):
    """Tiles, sequence after sequence: `code[t] = sequence * slots + place`, places counted in tiles
    or 16 positions."""

    code: Tensor  # [bound + 1] int32; after the last: of sequence `after`
    first: Tensor  # [X + 1] int32: the sequence's first tile; the last entry is the number of tiles
    slots: int
    bound: int  # number of tiles there can be at most


class Walk(NamedTuple):
    """The tiles that a forward program walks over: those of a group of texts, for each image all of
    them or those of the pairs that it keeps."""

    code: Tensor
    first: Tensor  # a group's first tile
    slots: int
    code_stride: int  # from one image's list to the next; 0: all have the same
    first_stride: int
    unit: int  # entries of `first` from one group to the next
    last: int  # the entry after the last group


class Division(NamedTuple):
    """How sequences that end above `above` and not above `upto` are divided into tiles.

    A tile of `width` positions begins where more than `rest` positions are left; in the list of
    rests, if there is anything left.
    """

    width: int
    rest: int = 0
    rests: bool = False
    above: int = 0
    upto: int = ENDLESS

    def most(self, length: int) -> int:
        """How many tiles a sequence of at most so many positions can have."""
        return 1 if self.rests else math.ceil(min(length, self.upto) / self.width)


@triton.jit
def _tile_counts(ends, x, X, width, rest, above, upto, RESTS: tl.constexpr):
    """Number of tiles of the sequences x, and of the long ones that come before a rest."""
    end = tl.load(ends + x, mask=x < X, other=0)
    end = tl.where((end > above) & (end <= upto), end, 0)
    long = (end + width - 1 - rest) // width
    count = long
    if RESTS:
        count = (end > long * width).to(tl.int32)
    return count, long


@triton.jit(do_not_specialize=["X", "after", "most"])
def list_kernel(
    code,
    first,
    ends,
    X,
    slots,
    unit,
    after,
    width,
    rest,
    above,
    upto,
    most,
    RESTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """List the tiles of BLOCK sequences behind those of all before."""
    before = tl.zeros([], tl.int32)
    for start in range(0, tl.program_id(0) * BLOCK, BLOCK):
        x = start + tl.arange(0, BLOCK)
        count, _ = _tile_counts(ends, x, X, width, rest, above, upto, RESTS)
        before += tl.sum(count, 0)
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count, long = _tile_counts(ends, x, X, width, rest, above, upto, RESTS)
    last = before + tl.cumsum(count, 0)
    begin = last - count
    tl.store(first + x, begin, mask=x < X)
    base = x * slots
    if RESTS:
        base += long * unit
    for t in range(0, most):
        tl.store(code + begin + t, base + t * unit, mask=t < count)
    tl.store(first + X + x * 0, last, mask=x == X - 1)
    tl.store(code + last, x * 0 + after * slots, mask=x == X - 1)


def tile_list(
    side: Sequences, division: Division, slots: int, unit: int = 1, after: int = 0
) -> TileList:
    """List the tiles of each sequence, each `unit` slots after the one before.

    `after` is the sequence that the entry after the last names: 0 is safe to load from,
    `sequences` is no text's.
    """
    X, most = side.sequences, division.most(side.length)
    code = side.ends.new_empty(X * most + 1)
    first = side.ends.new_empty(X + 1)
    sizes = (division.width, division.rest, division.above, division.upto, most)
    launcher(list_kernel, (math.ceil(X / BLOCK),))(
        code, first, side.ends, X, slots, unit, after, *sizes, RESTS=division.rests, BLOCK=BLOCK
    )
    return TileList(code, first, slots, X * most)


def text_tiles(side: Sequences, widths: tuple[int, ...]) -> list[TileList]:
    """List the tiles of the texts that take each tile width."""
    lists = []
    for division in _text_divisions(widths):
        # The most tiles that one text has number its places.
        slots = division.most(side.length)
        lists.append(tile_list(side, division, slots, after=side.sequences))
    return lists


def _text_divisions(widths: tuple[int, ...]) -> list[Division]:
    ends = (*widths[:-1], ENDLESS)  # longer texts take several tiles of the last width
    begins = (0, *widths[:-1])
    return [Division(w, above=a, upto=b) for w, a, b in zip(widths, begins, ends, strict=True)]


@triton.jit(do_not_specialize=["kept_stride", "J", "bound"])
def kept_tiles_kernel(
    out_code, out_first, kept, code, first, kept_stride, J, slots, group, bound, WIDTH: tl.constexpr
):
    """List the tiles of the texts that one image keeps, group after group of texts."""
    i = tl.program_id(0).to(tl.int64)
    groups = (J + group - 1) // group
    kept += i * kept_stride
    out_code += i * (bound + 1)
    out_first += i * (groups + 1)
    listed = tl.zeros([], tl.int32)
    for g in range(0, groups):
        tl.store(out_first + g, listed)
        end = tl.load(first + tl.minimum((g + 1) * group, J))
        for start in range(tl.load(first + g * group), end, WIDTH):
            t = start + tl.arange(0, WIDTH)
            here = tl.load(code + t, mask=t < end, other=0)
            keeps = tl.load(kept + here // slots, mask=t < end, other=0).to(tl.int32)
            tl.store(out_code + listed + tl.cumsum(keeps, 0) - 1, here, mask=keeps > 0)
            listed += tl.sum(keeps, 0)
    tl.store(out_first + groups, listed)
    tl.store(out_code + listed, J * slots)


def walk(tiles: TileList, group: int, kept: Tensor | None) -> Walk:
    """The walk over texts' tiles, of which `kept`, uint8 [I, J], says which each image keeps."""
    J = len(tiles.first) - 1
    if kept is None:
        return Walk(tiles.code, tiles.first, tiles.slots, 0, 0, group, J)
    groups = math.ceil(J / group)
    code = tiles.code.new_empty(len(kept), tiles.bound + 1)
    first = tiles.first.new_empty(len(kept), groups + 1)
    sizes = (kept.stride(0), J, tiles.slots, group, tiles.bound)
    arguments = (code, first, kept, tiles.code, tiles.first, *sizes)
    launcher(kept_tiles_kernel, (len(kept),))(*arguments, WIDTH=BLOCK)
    return Walk(code, first, tiles.slots, tiles.bound + 1, groups + 1, 1, groups)


def tiles_at_most(length: int, widths: tuple[int, ...]) -> list[int]:
    """How many tiles of each width a text of so many positions can have in `text_tiles`."""
    return [division.most(length) for division in _text_divisions(widths)]


def row_tiles(side: Sequences) -> TileList:
    """All positions up to each sequence's last valid one, in tiles of 16."""
    return tile_list(side, Division(16), math.ceil(side.length / 16))


def source_steps(side: Sequences, step: int) -> tuple[TileList, TileList]:
    """The same positions in steps of `step` and, where 16 are enough for what is left of a
    sequence, one of 16."""
    slots, unit, rest = math.ceil(side.length / 16), step // 16, min(16, step - 16)
    return (
        tile_list(side, Division(step, rest), slots, unit),
        tile_list(side, Division(step, rest, rests=True), slots, unit),
    )


def launcher(kernel: Callable, grid: tuple[int, ...]) -> Callable[..., None]:
    """What starts a kernel; with tensors without data it starts nothing, and compiles nothing."""

    def start(*arguments: object, **options: object) -> None:
        if has_data(arguments[0]):
            kernel[grid](*arguments, **options)  # type: ignore[index]

    return start


def device_limits(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability, and bytes of shared memory of a block; an sm_80's where there is no
    GPU."""
    known = assumed()
    if known is not None and known.limits is not None:
        return known.limits
    if not torch.cuda.is_available():
        return (8, 0), 163 * 1024
    properties = torch.cuda.get_device_properties(device)
    most = properties.shared_memory_per_block
    shared = getattr(properties, "shared_memory_per_block_optin", most)
    return (properties.major, properties.minor), shared
