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

from .sides import Sides, TensorPair, has_data

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = "-std=c++17 -O3 -fno-trapping-math -fno-math-errno -fopenmp"
AVX512 = "-mavx512f -mavx512dq -mfma -mprefer-vector-width=512"
VECTORS = {"AVX512": AVX512, "AVX2": "-mavx2 -mfma"}
BLOCK = 2**19  # bytes of the features of a thread's block of images, at the most
ENTRIES = 2**14  # rows that a thread lists to add them, at the most
FEW = 2**24  # multiplications for which other threads are not woken
TOKENS, ROWS, LANES = 64, 8, 16  # TOKENS, and the most of ROWS and L of cpu.cpp


def _fields(pointers: str, integers: str) -> list[tuple[str, type]]:
    kinds = (pointers, ctypes.c_void_p), (integers, ctypes.c_int64)
    return [(name, kind) for names, kind in kinds for name in names.split()]


class Side(ctypes.Structure):
    _fields_ = _fields("features rows ends", "D B")


class Pairs(ctypes.Structure):
    _fields_ = _fields("i2t t2i tokens patches", "token_bytes patch_bytes")


def compiled(source: Path, flags: list[str]) -> ctypes.CDLL:
    """The library of a C++ file, from the cache if it was compiled so before. Raises OSError or
    CalledProcessError where there is no compiler, or it fails."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    parts = source.read_bytes(), " ".join([*compiler, *flags]).encode()
    name = f"{source.stem}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    built = Path(os.environ.get("DS_CMLI_CACHE") or f"{home}/ds-cmli").expanduser() / name
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        # Ranks may all compile; each renames a whole library into place.
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            out = Path(folder) / name
            command = [*compiler, str(source), *flags, "-shared", "-fPIC", "-o", str(out)]
            subprocess.run(command, check=True, capture_output=True)
            out.replace(built)
    return ctypes.CDLL(str(built))


@functools.cache
def library() -> ctypes.CDLL:
    flags = f"{FLAGS} {VECTORS.get(torch.backends.cpu.get_cpu_capability(), '')}"
    loaded = compiled(SOURCE, flags.split())
    at, size, side, pairs = ctypes.c_void_p, ctypes.c_int64, *map(ctypes.POINTER, (Side, Pairs))
    scratch = size, size, at, size, ctypes.c_int
    loaded.cmli_rows.argtypes = at, size, size, at, at
    loaded.cmli_forward.argtypes = side, side, pairs, *scratch
    loaded.cmli_backward.argtypes = ctypes.c_int, side, side, pairs, at, *scratch
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
    seen = Side(*map(address, (features, rows, ends)), D, B)
    seen.tensors = features, rows, ends  # which it points to
    return seen


class Call:
    """What kernels are given: both sides, numbers of pairs, and memory of their threads."""

    def __init__(self, sides: Sides, matrices: TensorPair, argmax: TensorPair | None):
        image, text, token_mask, patch_mask = sides
        self.images, self.texts = side(image, patch_mask), side(text, token_mask)
        tokens, patches = argmax or (None, None)
        sizes = [0 if x is None else x.itemsize for x in (tokens, patches)]
        self.pairs = Pairs(*map(address, (*matrices, tokens, patches)), *sizes)

        (I, N, D), (J, M, _) = image.shape, text.shape  # noqa: E741
        # Patches of a block, at least those of an image; rows of a list, at least those of a pair.
        self.block, self.entries = max(N, BLOCK // (4 * D)), max(N + M, ENTRIES)
        columns, most = self.block + LANES, max(TOKENS, M)
        compared = 4 * (columns * (D + most + ROWS + 2) + 2 * (most + LANES)) + 16 * most
        listed = 8 * self.entries + 4 * (max(N, M) + 1)
        each = -(-max(compared, listed) // 64) * 64  # bytes of a thread
        threads = min(I, torch.get_num_threads())
        self.memory = image.new_empty(each * threads, dtype=torch.uint8)
        self.scratch = address(self.memory), each, 1 if I * N * J * M * D < FEW else threads


def forward(sides: Sides, scores: TensorPair, argmax: TensorPair | None) -> None:
    """Write scores [I, J], zeros before, and argmax indices [I, J, N] and [I, J, M]."""
    call = Call(sides, scores, argmax)
    if has_data(sides.image):
        given = call.texts, call.images, call.pairs, call.block, sides.text.shape[1]
        library().cmli_forward(*given, *call.scratch)


def backward(sides: Sides, grads: TensorPair, argmax: TensorPair, d_sides: TensorPair) -> None:
    """Add the gradients of image and text to those given, fp32."""
    call = Call(sides, grads, argmax)
    if has_data(sides.image):
        own = (0, call.texts, call.images, d_sides[1]), (1, call.images, call.texts, d_sides[0])
        for *of, out in own:
            sizes = out.shape[1], call.entries
            library().cmli_backward(*of, call.pairs, address(out), *sizes, *call.scratch)
