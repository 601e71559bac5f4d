"""Tile sizes of the Triton kernels, and the lists that tell a program which positions to work on.

Shape legend: X sequences of a side (images or texts), L positions of each, D features.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


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
    one in flight; earlier ones hold the tile in use in registers, where a tile of 64 beside 256
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
    where the source is longer than that, as steps of 32 waste less on short texts. In bf16, whose
    second term of the product needs registers too, sm_90 spills with 256 features.
    """
    if dtype.itemsize > 2:
        return BackwardTiles(64, 16, min(64, power_of_two(D)), 8, 2)
    wide = -D % 256 < 128  # 256 features at a time waste no more than 128 do
    if not wide or (dtype == torch.bfloat16 and capability[0] == 9):
        return BackwardTiles(128, 32, min(128, power_of_two(D)), 8, 3)
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
            self.counts = mask.sum(1, dtype=torch.int32)
            places = torch.arange(1, length + 1, dtype=torch.int16, device=device)
            self.ends = (self.mask * places).amax(1).to(torch.int32)  # last valid position + 1

    def inverse_counts(self, dtype: torch.dtype) -> Tensor:
        """[X] 1 / valid positions (1 where there are none, which have no tiles)."""
        return 1.0 / self.counts.clamp(min=1).to(dtype)


class TileList(NamedTuple):
    """Tiles, sequence after sequence: `code[t] = sequence * slots + place`, places counted in tiles
    or 16 positions."""

    code: Tensor  # [bound + 1] int32; after the last: of sequence `after`
    first: Tensor  # [X + 1] int32: the sequence's first tile; the last entry is the number of tiles
    slots: int
    bound: int  # number of tiles there can be at most


def tile_list(
    count: Tensor,
    bound_per_sequence: int,
    slots: int,
    base: Tensor | int = 0,
    unit: int = 1,
    after: int = 0,
) -> TileList:
    """List `count[x]` tiles of each sequence, the first at slot `base[x]`, the next `unit` slots
    further each.

    `after` is the sequence that the entries after the last name: 0 is safe to load from,
        `sequences` is no text's.
    """
    sequences = len(count)
    bound = sequences * bound_per_sequence
    first = torch.zeros(sequences + 1, dtype=torch.int32, device=count.device)
    torch.cumsum(count, 0, dtype=torch.int32, out=first[1:])
    tile = torch.arange(bound + 1, dtype=torch.int32, device=count.device)
    sequence = torch.searchsorted(first[1:], tile, right=True, out_int32=True)
    inside = sequence < sequences
    sequence = sequence.clamp_(max=sequences - 1)
    start = base[sequence] if isinstance(base, Tensor) else base
    code = sequence * slots + start + (tile - first[sequence]) * unit
    return TileList(torch.where(inside, code, after * slots), first, slots, bound)


def text_tiles(side: Sequences, widths: tuple[int, ...]) -> list[TileList]:
    """List the tiles of the texts that take each tile width."""
    lists, below = [], 0
    for width in widths:
        takes = side.ends > below
        if width != widths[-1]:
            takes &= side.ends <= width
        per_text = 1 if width != widths[-1] else math.ceil(side.length / width)
        count = torch.where(takes, (side.ends + width - 1) // width, 0)
        lists.append(tile_list(count, per_text, per_text, after=side.sequences))
        below = width
    return lists


def row_tiles(side: Sequences) -> TileList:
    """All positions up to each sequence's last valid one, in tiles of 16."""
    slots = math.ceil(side.length / 16)
    return tile_list((side.ends + 15) // 16, slots, slots)


def source_steps(side: Sequences, step: int) -> tuple[TileList, TileList]:
    """The same positions in steps of `step` and, where 16 are enough for what is left of a
    sequence, one of 16."""
    slots = math.ceil(side.length / 16)
    long = side.ends // step + (side.ends % step > 16).to(torch.int32)
    short = (side.ends > long * step).to(torch.int32)
    if step == 16:  # no rest of up to 16 is left out above
        long, short = (side.ends + 15) // 16, torch.zeros_like(side.ends)
    unit = step // 16
    return (
        tile_list(long, math.ceil(side.length / step), slots, unit=unit),
        tile_list(short, 1, slots, base=long * unit),
    )


def device_limits(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability, and bytes of shared memory of a block; an sm_80's where there is no
    GPU."""
    if not torch.cuda.is_available():
        return (8, 0), 163 * 1024
    properties = torch.cuda.get_device_properties(device)
    most = properties.shared_memory_per_block
    shared = getattr(properties, "shared_memory_per_block_optin", most)
    return (properties.major, properties.minor), shared
