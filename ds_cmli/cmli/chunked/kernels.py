"""The chunked backend's kernels for a CPU, compiled from `kernels.cpp` at their first use.

In forward, a block of images is multiplied with a few texts at a time, and both maxima of each pair
are taken while the similarities are in the cache. In backward, a row of the gradient is the sum of
rows of the other side, which are sorted by counting. Pairs with a gradient of exactly 0 are left
out; where few have another one, argmax positions are computed for these alone, an image at a time.

Where there is no compiler, PyTorch's operators take the kernels' place.

Shape legend: I images, J texts, N patches, M text positions, D features.
"""

import ctypes
import functools
import logging
from ctypes import POINTER, Structure, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from ds_cmli.cmli.chunked.packed import ArgmaxIndices, PackedBatch
from ds_cmli.cmli.without_data import assumed, has_data
from ds_cmli.common.errors import UserError
from ds_cmli.common.native import library

SOURCE = Path(__file__).parent / "kernels.cpp"
OPTIONS = ["-std=c++17", "-O3", "-fno-trapping-math", "-fno-math-errno", "-fopenmp"]
INSTRUCTIONS = {
    "AVX512": ["-mavx512f", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2", "-mfma"],
}
BLOCK = 2**19  # bytes of the features of a thread's block of images, at the most
ENTRIES = 2**14  # rows that a thread lists to add them, at the most
FEW = 2**24  # multiplications for which other threads are not woken
TOKENS, ROWS, LANES = 64, 8, 16  # `TOKENS`, and the most of `ROWS` and `L` of comparison.h
Both = tuple[Tensor, Tensor]


class Side(Structure):
    """A `PackedBatch`."""

    _fields_ = (
        ("features", c_void_p),
        ("source", c_void_p),
        ("last", c_void_p),
        ("order", c_void_p),
        ("scale", c_void_p),
        ("D", c_int64),
    )

    @classmethod
    def of(cls, side: PackedBatch) -> "Side":
        source = None if side.source is None else side.source.data_ptr()
        last, order, scale = (x.data_ptr() for x in (side.last, side.order, side.scale))
        return cls(side.features.data_ptr(), source, last, order, scale, side.features.shape[1])


class Pairs(Structure):
    """A matrix [I, J] of any strides."""

    _fields_ = (("values", c_void_p), ("of_image", c_int64), ("of_text", c_int64))

    @classmethod
    def of(cls, matrix: Tensor) -> "Pairs":
        return cls(matrix.data_ptr(), *matrix.stride())


class Range(Structure):
    """Sequences of a side in its sorted order."""

    _fields_ = (("first", c_int64), ("stop", c_int64))

    @classmethod
    def of(cls, side: PackedBatch, part: tuple[int, int]) -> "Range":
        """The sequences of a part that are not empty."""
        empty = side.lengths.count(0)
        return cls(max(part[0], empty), max(part[1], empty))


class Indices(Structure):
    """`ArgmaxIndices`, laid out as `sides.h` says."""

    _fields_ = (
        ("tokens", c_void_p),
        ("patches", c_void_p),
        ("token_bytes", c_int64),
        ("patch_bytes", c_int64),
        ("texts", c_int64),
        ("rows", c_int64),
        ("image", c_int64),
        ("row", c_int64),
    )

    @classmethod
    def of(cls, indices: ArgmaxIndices, texts: PackedBatch) -> "Indices":
        i2t, t2i, sequence, row = indices
        places = i2t.data_ptr(), t2i.data_ptr(), i2t.itemsize, t2i.itemsize
        return cls(*places, len(texts.lengths), sum(texts.lengths), sequence, row)


SIDES, MATRICES = [POINTER(Side)] * 2, [POINTER(Pairs)] * 2
OF_BOTH = [*SIDES, Range, Range, *MATRICES, POINTER(Indices)]
SCRATCH = [c_void_p, c_int64, c_int]
ARGUMENTS = {
    "compare": [*OF_BOTH, *MATRICES, c_int64, c_int64, *SCRATCH],
    "gradient": [c_int, *OF_BOTH, c_void_p, c_int64, *SCRATCH],
}


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library; None, which is logged, where it cannot be compiled."""
    instructions = INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), [])
    try:
        loaded = ctypes.CDLL(str(library(SOURCE, [*OPTIONS, *instructions])))
    except (UserError, OSError) as error:
        logging.getLogger(__name__).info(
            "all-pairs CMLI runs without kernels of its own: %s", error
        )
        return None
    for name, arguments in ARGUMENTS.items():
        for dtype in ("float32", "float64"):
            function = getattr(loaded, f"{name}_{dtype}")
            function.argtypes, function.restype = arguments, None
    return loaded


def suited(device: str, dtype: torch.dtype) -> bool:
    """Whether the kernels run on such a device with features of this dtype."""
    return device == "cpu" and dtype in (torch.float32, torch.float64) and load() is not None


# What `torch.compiler.assume_constant_result` sets, without the second that its import takes.
suited._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Scratch:
    """Memory of the kernels' threads, which sizes and budget alone decide, but for their number.

    Args:
        sizes: N, M and D.
    """

    def __init__(self, sizes: tuple[int, int, int], width: int, budget: int, backward: bool):
        (N, M, D), tokens = sizes, max(TOKENS, sizes[1])
        # At least one image; at least the rows that one pair lists.
        self.patches = max(N, min(BLOCK, budget // 64) // (D * width))
        self.entries = backward * max(N + M, min(ENTRIES, budget // 256))
        columns = self.patches + LANES
        compared = columns * (D + tokens + ROWS + 2) + 2 * (tokens + LANES)
        listed = 2 * width * self.entries + 4 * (max(N, M) + 1)
        per_thread = max(compared * width + 16 * tokens, listed)
        self.each = -(-per_thread // 64) * 64
        self.threads = max(1, min(torch.get_num_threads(), budget // 4 // self.each))

    def bytes(self) -> int:
        return self.each * self.threads


class Kernels:
    """The kernels for both sides of a call; for its backward, with the gradients of the scores."""

    def __init__(
        self,
        texts: PackedBatch,
        images: PackedBatch,
        budget: int,
        grads: Both | None,
        own: int,
    ):
        self.texts, self.images = texts, images
        self.has_data = has_data(texts.features)
        self.grads: Both | None = None
        self.kept: Both | None = None
        if grads is not None:
            self.grads = grads[0].to(texts.wide), grads[1].to(texts.wide)
            if self.has_data and (own or self._few(self.grads)):
                self.kept = self.grads
        elif own:
            J, new = len(texts.lengths), texts.features.new_zeros
            of_texts = new(J, own, J)
            of_texts.diagonal(dim1=0, dim2=2).fill_(1)
            self.kept = new(0), of_texts.flatten(0, 1)
        self.dtype = texts.features.dtype
        sizes = images.positions, texts.positions, texts.features.shape[1]
        self.sizes = Scratch(sizes, self.dtype.itemsize, budget, grads is not None)
        self.scratch = texts.features.new_empty(self.sizes.bytes(), dtype=torch.uint8)

    def compare(
        self,
        part: tuple[int, int],
        scores: Both | None = None,
        indices: ArgmaxIndices | None = None,
    ) -> None:
        """Write the scores, the argmax indices, or both, of all texts and a part of the images.

        Only of a text's own images, if there are such; in backward, where few pairs have a
        gradient, only of these.
        """
        if not self.has_data:
            return
        winners = None if indices is None else Indices.of(indices, self.texts)
        matrices = *_matrices(scores), winners, *_matrices(self.kept)
        self._call(
            "compare",
            *self._sides(),
            *self._ranges(part),
            *matrices,
            self.sizes.patches,
            self.texts.positions,
        )

    def add_gradients(
        self,
        part: tuple[int, int],
        indices: ArgmaxIndices,
        d_image: Tensor,
        d_text: Tensor,
    ) -> None:
        """Add what a part of the images contributes to the gradients [B * P, D] of both sides.

        An empty tensor is not wanted.
        """
        if not self.has_data:
            return
        winners, ranges = Indices.of(indices, self.texts), self._ranges(part)
        pairs, sides = _matrices(self.grads), self._sides()
        for of_image, into in ((False, d_text), (True, d_image)):
            # The side whose gradient it is comes first.
            turn = -1 if of_image else 1
            own = *sides[::turn], *ranges[::turn], *pairs[::-turn]
            if into.numel():
                entries = self.sizes.entries
                self._call("gradient", of_image, *own, winners, into.data_ptr(), entries)

    def _call(self, name: str, *arguments: object) -> None:
        function = getattr(load(), f"{name}_{str(self.dtype).removeprefix('torch.')}")
        products = sum(self.texts.lengths) * sum(self.images.lengths) * self.texts.features.shape[1]
        threads = self.sizes.threads if products > FEW else 1
        with torch.profiler.record_function(f"cmli: {name}"):
            function(*arguments, self.scratch.data_ptr(), self.sizes.each, threads)

    def _sides(self) -> tuple[Side, Side]:
        return Side.of(self.texts), Side.of(self.images)

    def _ranges(self, part: tuple[int, int]) -> tuple[Range, Range]:
        everything = 0, len(self.texts.lengths)
        return Range.of(self.texts, everything), Range.of(self.images, part)

    def _few(self, grads: Both) -> bool:
        """Whether it is faster to take an image at a time, whose patches fill whole vectors."""
        N = self.images.positions
        return all(int(g.count_nonzero()) * (N + LANES) <= g.numel() * N for g in grads)


def _matrices(both: Both | None) -> tuple[Pairs | None, Pairs | None]:
    if both is None:
        return None, None
    # Of one direction, the first is empty.
    return (Pairs.of(both[0]) if both[0].numel() else None), Pairs.of(both[1])


def kernels_for(
    texts: PackedBatch, images: PackedBatch, budget: int, grads: Both | None = None, own: int = 0
) -> Kernels | None:
    """The kernels of a call; None where they do not run."""
    features, known = texts.features, assumed()
    device = features.device.type if known is None else known.device
    if not suited(device, features.dtype):
        return None
    return Kernels(texts, images, budget, grads, own)
