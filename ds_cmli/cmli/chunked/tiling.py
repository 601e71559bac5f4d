"""How large the chunked backend's tiles are, computed from what a tile holds in memory.

`tile_sizes` makes tiles of the fastest size, or smaller ones until their bytes fit the budget.

Shape legend: T tokens of c texts, K patches of i images in a tile; D features.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ds_cmli.cmli.chunked.packed import ChunkShape

# Tokens and patches of a tile, as measured: a forward tile (6 MB of fp32 similarities) stays in the
# last-level cache; backward wants larger ones, as its tables are small and its sorts four times
# faster above 32,768 elements.
FORWARD_ROWS = (512, 3136)
BACKWARD_ROWS = (2048, 6272)
MOST_TEXTS = 64
CPU = Path("/proc/cpuinfo")
# On AMD processors oneDNN's fp32 product is about twice as fast as MKL's, which torch.mm takes; on
# Intel's MKL leads.
ONEDNN = torch.backends.mkldnn.is_available() and CPU.exists() and "AuthenticAMD" in CPU.read_text()


def product(text: Tensor, image: Tensor) -> Tensor:
    """text [T, D] @ image [K, D]^T -> [T, K], in fp32 or fp64."""
    if ONEDNN and text.dtype == torch.float32 and text.device.type == "cpu":
        return torch.ops.mkldnn._linear_pointwise(text, image, None, "none", [], "")
    return torch.mm(text, image.t())


class Widths(NamedTuple):
    """Bytes of an element in the features' dtype, and in the dtype of the arithmetic."""

    narrow: int
    wide: int

    @classmethod
    def of(cls, dtype: torch.dtype) -> "Widths":
        return cls(dtype.itemsize, torch.promote_types(dtype, torch.float32).itemsize)


def load_bytes(rows: int, D: int, width: Widths) -> int:
    """Bytes of `PackedBatch.load_buffers`: copies of rows that a mask selects, and of 16-bit rows
    in fp32."""
    narrow = width.narrow < width.wide
    return rows * D * (narrow * width.narrow + width.wide)


def forward_tile_bytes(text: ChunkShape, image: ChunkShape, width: Widths) -> int:
    """Bytes of a forward tile: similarities, both maxima, the means, and then the comparison with
    the maxima."""
    (T, c, _), (K, i, _) = text, image
    return width.wide * (T * K + c * K + T * i + max(c * i, T * K))


def backward_buffer_bytes(own: ChunkShape, other: ChunkShape, D: int, width: Widths) -> int:
    """Bytes held throughout one side's gradient: its rows, and a tile's argmax indices with their
    weights."""
    indices = max(own.rows * other.sequences, own.sequences * other.rows)
    return own.rows * (D * width.wide + 4 + 8) + indices * (4 + 4 + 8 + 2 * width.wide)


def gather_tile_bytes(own: ChunkShape, other: ChunkShape, D: int, width: Widths) -> int:
    """Bytes that operators allocate in a gathering tile: the sort, and embedding_bag, which has no
    `out=`."""
    won, lost = own.rows * other.sequences, own.sequences * other.rows
    bags = own.rows * D * width.wide
    if width.wide == 4:
        gather = bags + 2 * 8 * own.rows
    else:  # embedding_bag has no fused fp64 kernel: it lists the bag of each index, twice
        won = 4 * own.rows + 4 * (won + 1) + max(4 * (won + 1), 2 * 4 * own.rows)
        gather = bags + max(won, 8 * (lost + 1) + max(8 * (lost + 1), 2 * 8 * own.rows))
    return max(gather, 8 * lost)


def _gradient_bytes(own: ChunkShape, other: ChunkShape, D: int, width: Widths) -> int:
    """Bytes of one side's gradient."""
    return backward_buffer_bytes(own, other, D, width) + gather_tile_bytes(own, other, D, width)


def tile_sizes(
    N: int, M: int, D: int, dtype: torch.dtype, scratch_bytes: int, backward: bool
) -> tuple[ChunkShape, ChunkShape]:
    """The largest allowed chunk of texts and chunk of images, for texts of up to M and images of up
    to N rows.

    One text and one image at least, even where these exceed the budget.
    """
    width = Widths.of(dtype)
    text_rows, image_rows = BACKWARD_ROWS if backward else FORWARD_ROWS
    texts, images = MOST_TEXTS, max(1, image_rows // N)
    while True:
        text, image = ChunkShape(max(text_rows, M), texts, M), ChunkShape(images * N, images, N)
        need = load_bytes(text.rows, D, width) + load_bytes(image.rows, D, width)
        if backward:
            of_text = _gradient_bytes(text, image, D, width)
            need += max(of_text, _gradient_bytes(image, text, D, width))
        else:
            need += forward_tile_bytes(text, image, width)
        if need <= scratch_bytes or (text_rows <= M and texts == images == 1):
            return text, image
        text_rows, texts, images = text_rows // 2, max(1, texts // 2), max(1, images // 2)


class RecomputePlan(NamedTuple):
    """How a backward that recomputes indices splits the images: into `number` parts of `images`
    images each."""

    images: int
    number: int
    budget: int  # bytes that are left for tiles

    @classmethod
    def of(
        cls,
        I: int,  # noqa: E741
        N: int,
        J: int,
        tokens: int,
        M: int,
        scratch_bytes: int,
    ) -> "RecomputePlan":
        """The plan for J texts with `tokens` valid tokens: indices get half of the budget, and at
        least one image's. Of one direction J is 0: no patch has an index."""
        of_image = J * N * (1 if M <= 256 else 2) + tokens * (1 if N <= 256 else 2)
        images = min(I, max(1, scratch_bytes // 2 // max(1, of_image)))
        return cls(images, -(-I // images), scratch_bytes // 2)
