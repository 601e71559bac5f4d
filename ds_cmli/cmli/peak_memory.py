"""What a call of `cmli_scores` allocates at its peak: an opaque operator hides its scratch memory
from any tracing.

Shape legend: I images, J texts, N patches, M text positions (padded), D features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ds_cmli.cmli.chunked.kernels import Scratch, suited
from ds_cmli.cmli.chunked.packed import ChunkShape, joined, make_chunks
from ds_cmli.cmli.chunked.tiling import (
    RecomputePlan,
    Widths,
    backward_buffer_bytes,
    forward_tile_bytes,
    gather_tile_bytes,
    load_bytes,
    tile_sizes,
)
from ds_cmli.cmli.inputs import DEFAULT_SCRATCH_BYTES, index_dtype


class PeakBytes(NamedTuple):
    """Bytes that one call requests from the allocator, at the most, beyond its arguments.

    forward: during forward, scores and saved argmax indices included.
    saved: the argmax indices, which stay until backward (the inputs, which autograd also keeps, not
        counted).
    backward: during backward, the gradients it returns included, the saved indices not.
    gradients: of these, the gradients returned.
    extra: over both, beyond inputs and their gradients; the scores and the gradients that come in
        for them included.
    """

    forward: int
    saved: int
    backward: int
    gradients: int
    extra: int


def cmli_peak_bytes(
    I: int,  # noqa: E741
    J: int,
    N: int,
    M: int,
    D: int,
    dtype: torch.dtype,
    *,
    backend: str = "chunked",
    device: str = "cpu",
    recompute: bool = False,
    scratch_bytes: int = DEFAULT_SCRATCH_BYTES,
    text_lengths: Sequence[int] | None = None,
    image_lengths: Sequence[int] | None = None,
    limits: tuple[tuple[int, int], int] | None = None,
) -> PeakBytes:
    """Peak memory of `cmli_scores` and its backward, both inputs requiring gradients, for
    contiguous arguments.

    Args:
        I, J, N, M, D, dtype: shapes and dtype of image [I, N, D] and text [J, M, D].
        device: its type. The chunked backend has kernels of its own for "cpu", which take less
            memory, if it finds a compiler here.
        recompute, scratch_bytes: as given to `cmli_scores`.
        text_lengths: valid tokens of each text; None = the most that any lengths need (a few
            percent above all M).
        image_lengths: valid patches of each image, where an image_mask is given; None = no
            image_mask.
        limits: compute capability and shared memory of a block, in bytes, of the GPU that triton's
            tiles are for; None = the current one, or an A100 where there is none.

    Equal to the allocator's count on a CPU where `text_lengths` are given. Not included is the
    workspace that a library's matrix product takes for itself (oneDNN: about 65 KB a thread at
    D=256), which shows only where a tile needs less than that after its product. On a GPU the
    allocator rounds each buffer up to 512 bytes, and `sort` takes more.

    Raises:
        ValueError: a backend whose memory is not known, or lengths that are not one number for each
            sequence.
    """
    if backend not in ("chunked", "triton"):
        raise ValueError(f"backend={backend!r}: peak memory is known for chunked and triton")
    for name, lengths, number, most in (
        ("text_lengths", text_lengths, J, M),
        ("image_lengths", image_lengths, I, N),
    ):
        if lengths is None:
            continue
        if len(lengths) != number or min(lengths) < 0 or max(lengths) > most:
            raise ValueError(f"{name} must hold {number} numbers from 0 to {most}")
    width = Widths.of(dtype)
    scores = 2 * I * J * width.wide
    saved = 0 if recompute else I * J * (N * index_dtype(M).itemsize + M * index_dtype(N).itemsize)
    gradients = (I * N + J * M) * D * width.narrow
    if backend == "triton":
        from ds_cmli.cmli.triton import Sizes, peak_bytes

        sizes = Sizes(I, J, N, M, D)
        forward, backward = peak_bytes(sizes, dtype, recompute, scratch_bytes, limits)
    else:
        text = _PackedSizes(J, M, text_lengths, True, D, width)
        image = _PackedSizes(I, N, image_lengths or [N] * I, image_lengths is not None, D, width)
        tables = text.table_bytes() + image.table_bytes()
        compiled = suited(device, dtype)
        if compiled:
            tiles = Scratch((N, M, D), width.wide, scratch_bytes, False).bytes()
        else:
            largest = tile_sizes(N, M, D, dtype, scratch_bytes, backward=False)
            tiles = _forward_tiles(text, image, largest, (0, I), True, not recompute)
        forward = scores + saved + tables + tiles
        backward = _backward(text, image, dtype, recompute, scratch_bytes, compiled)
        backward += gradients + tables
    # When backward groups, the scores and their gradients are there as well.
    extra = max(forward, 2 * scores + saved + backward - gradients)
    return PeakBytes(forward, saved, backward, gradients, extra)


class _PackedSizes:
    """The bytes of a `PackedBatch`, for lengths that are known or, where they are None, for any."""

    def __init__(
        self,
        number: int,
        longest: int,
        lengths: Sequence[int] | None,
        masked: bool,
        D: int,
        width: Widths,
    ):
        self.number, self.longest, self.masked = number, longest, masked
        self.D, self.width = D, width
        self.lengths = None if lengths is None else sorted(lengths)
        self.rows = number * longest if lengths is None else sum(lengths)

    def table_bytes(self) -> int:
        return self.number * (8 + 8 + self.width.wide + 4) + self.masked * self.rows * 8

    def size(self, first: int, stop: int) -> tuple[int, int]:
        """Rows and sequences that are not empty."""
        lengths = [n for n in (self.lengths or [])[first:stop] if n]
        return sum(lengths), len(lengths)

    def shapes(self, most: ChunkShape, first: int = 0, stop: int | None = None) -> set[ChunkShape]:
        """The sizes of the chunks."""
        if self.lengths is None:
            rows, sequences = min(most.rows, self.rows), min(most.sequences, self.number)
            return {ChunkShape(rows, sequences, most.longest)}
        chunks = make_chunks(self.lengths, most, first, stop)
        return {chunk.shape() for chunk in chunks} or {ChunkShape(0, 0, 0)}

    def load_bytes(self, shapes: set[ChunkShape]) -> int:
        return load_bytes(joined(shapes).rows, self.D, self.width, self.masked)


def _forward_tiles(
    text: _PackedSizes,
    image: _PackedSizes,
    most: tuple[ChunkShape, ChunkShape],
    part: tuple[int, int],
    with_scores: bool,
    with_indices: bool,
) -> int:
    """Bytes of the forward tiles of all texts and the images [first, stop) = `part`."""
    texts, images, width = text.shapes(most[0]), image.shapes(most[1], *part), text.width
    tile = 0
    for t in texts:
        for i in images:
            tile = max(tile, forward_tile_bytes(t, i, width, with_scores, with_indices))
    distances = (text.rows + image.rows) * width.wide if with_indices else 0
    return text.load_bytes(texts) + image.load_bytes(images) + distances + tile


def _backward(
    text: _PackedSizes,
    image: _PackedSizes,
    dtype: torch.dtype,
    recompute: bool,
    scratch_bytes: int,
    compiled: bool,
) -> int:
    """Bytes at the peak of the backward, without gradients and tables."""
    I, J, D = image.number, text.number, text.D  # noqa: E741
    N, M, width = image.longest, text.longest, text.width
    plan = RecomputePlan(I, 1, scratch_bytes)
    if recompute:
        plan = RecomputePlan.of(I, N, J, text.rows, M, scratch_bytes)
    scratch = Scratch((N, M, D), width.wide, plan.budget, True).bytes()
    most_text, most_image = tile_sizes(N, M, D, dtype, plan.budget, backward=True)
    forward_most = tile_sizes(N, M, D, dtype, plan.budget, backward=False)
    texts = text.shapes(most_text)
    peak = 0
    # Parts of images of equal lengths need the same memory, but for the last, which may be smaller.
    starts = list(range(0, I, plan.images))
    if not image.masked:
        starts = sorted({0, (plan.number - 1) * plan.images})
    for first in starts:
        stop = min(first + plan.images, I)
        indices = 0
        if recompute:
            rows, sequences = image.size(first, stop)
            indices = J * rows * index_dtype(M).itemsize
            indices += text.rows * sequences * index_dtype(N).itemsize
            if text.lengths is None and plan.number > 1:
                indices = max(indices, plan.budget)  # shorter texts make larger parts
        if compiled:
            peak = max(peak, indices + scratch)
            continue
        images = image.shapes(most_image, first, stop)
        if recompute:
            tiles = _forward_tiles(text, image, forward_most, (first, stop), False, True)
            peak = max(peak, indices + tiles)
        of_image = _side_backward(image, text, images, texts)
        of_text = _side_backward(text, image, texts, images)
        peak = max(peak, indices + max(of_image, of_text))
    if plan.number > 1 and width.narrow < width.wide:
        peak += J * M * D * width.wide
    return peak


def _side_backward(
    own: _PackedSizes,
    other: _PackedSizes,
    owns: set[ChunkShape],
    others: set[ChunkShape],
) -> int:
    """Bytes at the peak of computing one side's gradient, when both are cut into these chunks."""
    D, width = own.D, own.width
    tile = 0
    for o in owns:
        for x in others:
            tile = max(tile, gather_tile_bytes(o, x, D, width))
    most, most_other = joined(owns), joined(others)
    store = most.rows * D * width.narrow if own.masked and width.narrow < width.wide else 0
    buffers = backward_buffer_bytes(most, most_other, D, width)
    return other.load_bytes(others) + buffers + max(tile, store)
