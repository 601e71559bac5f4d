"""The C++ kernels for a CPU, compiled from `cpu.cpp` at their first use.

Everything is computed in fp32: a CPU multiplies bf16 no faster than the fp32 to which it is upcast.

Shapes: I images of N patches, J texts of M positions, D features.
"""

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from .op import Pair, has_data

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = "-std=c++17 -O3 -fno-trapping-math -fno-math-errno -fopenmp -shared -fPIC"
VECTORS = {
    "AVX512": "-mavx512f -mavx512dq -mfma -mprefer-vector-width=512",
    "AVX2": "-mavx2 -mfma",
}
BLOCK = 2**19  # bytes of the features of a thread's block of images, at the most
ENTRIES = 2**14  # rows that a thread lists to add them, at the most
FEW = 2**24  # multiplications for which other threads are not woken
TOKENS, ROWS, LANES = 64, 8, 16  # TOKENS, and the most of ROWS and L of cpu.cpp


class Side(ctypes.Structure):
    _fields_ = (
        ("features", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("ends", ctypes.c_void_p),
        ("D", ctypes.c_int64),
        ("B", ctypes.c_int64),
    )


class Pairs(ctypes.Structure):
    _fields_ = (
        ("i2t", ctypes.c_void_p),
        ("t2i", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("patches", ctypes.c_void_p),
        ("token_bytes", ctypes.c_int64),
        ("patch_bytes", ctypes.c_int64),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """Raises OSError or CalledProcessError where there is no compiler, or it fails."""
    flags = f"{FLAGS} {VECTORS.get(torch.backends.cpu.get_cpu_capability(), '')}".split()
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    parts = SOURCE.read_bytes(), " ".join([*compiler, *flags]).encode()
    name = f"cpu-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    built = Path(home).expanduser() / "ds-cmli" / name
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        # Ranks may all compile; each renames a whole library into place.
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            out = Path(folder) / name
            command = [*compiler, str(SOURCE), *flags, "-o", str(out)]
            subprocess.run(command, check=True, capture_output=True)
            out.replace(built)
    loaded = ctypes.CDLL(str(built))
    at, size, side, pairs = ctypes.c_void_p, ctypes.c_int64, *map(ctypes.POINTER, (Side, Pairs))
    scratch = size, size, at, size, ctypes.c_int
    loaded.cmli_rows.argtypes = at, size, size, at, at
    loaded.cmli_forward.argtypes = side, side, pairs, *scratch
    loaded.cmli_backward.argtypes = ctypes.c_int, side, side, pairs, at, *scratch
    for function in (loaded.cmli_rows, loaded.cmli_forward, loaded.cmli_backward):
        function.restype = None
    return loaded


def address(x: Tensor | None) -> int | None:
    return x.data_ptr() if x is not None and has_data(x) else None


def side(features: Tensor, mask: Tensor | None) -> Side:
    B, P, D = features.shape
    features = features.float().contiguous()
    rows = features.new_empty(B * P, dtype=torch.int64)
    ends = features.new_empty(B, dtype=torch.int32)
    if has_data(features):
        mask = None if mask is None else mask.contiguous()
        library().cmli_rows(address(mask), B, P, address(rows), address(ends))
    seen = Side(address(features), address(rows), address(ends), D, B)
    seen.tensors = features, rows, ends  # which it points to
    return seen


def pairs(matrices: Pair, argmax: Pair | None) -> Pairs:
    tokens, patches = argmax or (None, None)
    sizes = [0 if x is None else x.itemsize for x in (tokens, patches)]
    return Pairs(*map(address, (*matrices, tokens, patches)), *sizes)


class Scratch:
    """Memory of the kernels' threads."""

    def __init__(self, image: Tensor, text: Tensor):
        (I, N, D), (J, M, _) = image.shape, text.shape  # noqa: E741
        # Patches of a block, at least those of an image; rows of a list, at least those of a pair.
        self.block, self.entries = max(N, BLOCK // (4 * D)), max(N + M, ENTRIES)
        columns, tokens = self.block + LANES, max(TOKENS, M)
        compared = 4 * (columns * (D + tokens + ROWS + 2) + 2 * (tokens + LANES)) + 16 * tokens
        listed = 8 * self.entries + 4 * (max(N, M) + 1)
        self.each = -(-max(compared, listed) // 64) * 64  # bytes of a thread
        threads = min(I, torch.get_num_threads())
        self.memory = image.new_empty(self.each * threads, dtype=torch.uint8)
        self.threads = 1 if I * N * J * M * D < FEW else threads

    def arguments(self) -> tuple[int | None, int, int]:
        return address(self.memory), self.each, self.threads


def forward(
    image: Tensor,
    text: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    scores: Pair,
    argmax: Pair | None,
) -> None:
    """Write scores [I, J], zeros before, and argmax indices [I, J, N] and [I, J, M]."""
    images, texts = side(image, patch_mask), side(text, token_mask)
    scratch, out = Scratch(image, text), pairs(scores, argmax)
    if has_data(image):
        sizes = scratch.block, text.shape[1]
        library().cmli_forward(texts, images, out, *sizes, *scratch.arguments())


def backward(
    grads: Pair,
    image: Tensor,
    text: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    argmax: Pair,
    d_image: Tensor,
    d_text: Tensor,
) -> None:
    """Add the gradients of image and text to fp32 `d_image` and `d_text`."""
    images, texts = side(image, patch_mask), side(text, token_mask)
    scratch, both = Scratch(image, text), pairs(grads, argmax)
    if has_data(image):
        for of_image, own, other, out in ((0, texts, images, d_text), (1, images, texts, d_image)):
            sizes = out.shape[1], scratch.entries
            arguments = of_image, own, other, both, address(out), *sizes, *scratch.arguments()
            library().cmli_backward(*arguments)
