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
COMPILER_FLAGS = "-std=c++17 -O3 -fno-trapping-math -fno-math-errno -fopenmp"
AVX512_FLAGS = "-mavx512f -mavx512dq -mfma -mprefer-vector-width=512"
VECTOR_FLAGS = {"AVX512": AVX512_FLAGS, "AVX2": "-mavx2 -mfma"}
MAX_BLOCK_BYTES = 2**19  # of the features of a thread's block of images
MAX_ENTRIES = 2**14  # rows that a thread lists to add them
MAX_SERIAL = 2**24  # multiplications for which other threads are not woken
# Constants of cpu.cpp: TOKENS, and the maxima of ROWS and L.
MIN_TOKENS = 64
MAX_ROWS = 8
MAX_LANES = 16


def _fields(pointers: str, integers: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in pointers.split()] + [
        (name, ctypes.c_int64) for name in integers.split()
    ]


class SideStruct(ctypes.Structure):
    """`Side` of cpu.cpp."""

    _fields_ = _fields("features rows ends", "D B")


class PairsStruct(ctypes.Structure):
    """`Pairs` of cpu.cpp."""

    _fields_ = _fields("i2t t2i tokens patches", "token_bytes patch_bytes")


def compiled(source: Path, flags: list[str]) -> ctypes.CDLL:
    """Return the library of a C++ file, from the cache if it was compiled so before.

    Raises OSError or CalledProcessError if there is no compiler, or it fails.
    """
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    command_line = " ".join([*compiler, *flags])
    digest = hashlib.sha256(source.read_bytes() + b"|" + command_line.encode()).hexdigest()
    name = f"{source.stem}-{digest[:16]}.so"
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    library_file = Path(os.environ.get("DS_CMLI_CACHE") or f"{home}/ds-cmli").expanduser() / name
    if not library_file.exists():
        library_file.parent.mkdir(parents=True, exist_ok=True)
        # Ranks may all compile; each renames a whole library into place.
        with tempfile.TemporaryDirectory(dir=library_file.parent) as folder:
            out = Path(folder) / name
            command = [*compiler, str(source), *flags, "-shared", "-fPIC", "-o", str(out)]
            subprocess.run(command, check=True, capture_output=True)
            out.replace(library_file)
    return ctypes.CDLL(str(library_file))


@functools.cache
def load_kernels() -> ctypes.CDLL:
    """Return the library of cpu.cpp for this processor. Raises as `compiled`."""
    vector_flags = VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), "")
    kernels = compiled(SOURCE, f"{COMPILER_FLAGS} {vector_flags}".split())
    pointer = ctypes.c_void_p
    integer = ctypes.c_int64
    side = ctypes.POINTER(SideStruct)
    pairs = ctypes.POINTER(PairsStruct)
    scratch = (integer, integer, pointer, integer, ctypes.c_int)
    kernels.cmli_rows.argtypes = (pointer, integer, integer, pointer, pointer)
    kernels.cmli_forward.argtypes = (side, side, pairs, *scratch)
    kernels.cmli_backward.argtypes = (ctypes.c_int, side, side, pairs, pointer, *scratch)
    return kernels


def address(x: Tensor | None) -> int | None:
    return x.data_ptr() if x is not None and has_data(x) else None


def side_struct(features: Tensor, mask: Tensor | None) -> SideStruct:
    """Return the features of one side in fp32, with the places of their valid rows."""
    B, P, D = features.shape
    features = features.float().contiguous()
    rows = features.new_empty(B * P, dtype=torch.int64)
    ends = features.new_empty(B, dtype=torch.int32)
    if has_data(features):
        mask = None if mask is None else mask.contiguous()
        load_kernels().cmli_rows(address(mask), B, P, address(rows), address(ends))
    struct = SideStruct(address(features), address(rows), address(ends), D, B)
    struct.tensors = features, rows, ends  # it points to their memory
    return struct


class Call:
    """The arguments of kernels: both sides, matrices of pairs, and memory of the threads."""

    def __init__(self, sides: Sides, matrices: TensorPair, argmax: TensorPair | None):
        self.images = side_struct(sides.image, sides.patch_mask)
        self.texts = side_struct(sides.text, sides.token_mask)
        tokens, patches = argmax or (None, None)
        index_bytes = [0 if x is None else x.itemsize for x in (tokens, patches)]
        addresses = [address(x) for x in (*matrices, tokens, patches)]
        self.pairs = PairsStruct(*addresses, *index_bytes)

        I, N, D = sides.image.shape  # noqa: E741
        J, M, _ = sides.text.shape
        # Patches of a block, at least those of an image; rows of a list, at least those of a pair.
        self.block = max(N, MAX_BLOCK_BYTES // (4 * D))
        self.entries = max(N + M, MAX_ENTRIES)
        columns = self.block + MAX_LANES
        tokens_at_once = max(MIN_TOKENS, M)
        floats = columns * (D + tokens_at_once + MAX_ROWS + 2) + 2 * (tokens_at_once + MAX_LANES)
        forward_bytes = 4 * floats + 16 * tokens_at_once
        backward_bytes = 8 * self.entries + 4 * (max(N, M) + 1)
        thread_bytes = -(-max(forward_bytes, backward_bytes) // 64) * 64
        threads = min(I, torch.get_num_threads())
        self.memory = sides.image.new_empty(thread_bytes * threads, dtype=torch.uint8)
        if I * N * J * M * D < MAX_SERIAL:
            threads = 1
        self.scratch = address(self.memory), thread_bytes, threads


def forward(sides: Sides, scores: TensorPair, argmax: TensorPair | None) -> None:
    """Write scores [I, J], zeros before, and argmax indices [I, J, N] and [I, J, M]."""
    call = Call(sides, scores, argmax)
    if has_data(sides.image):
        longest = sides.text.shape[1]
        load_kernels().cmli_forward(
            call.texts, call.images, call.pairs, call.block, longest, *call.scratch
        )


def backward(sides: Sides, d_scores: TensorPair, argmax: TensorPair, d_sides: TensorPair) -> None:
    """Add the gradients of image and text to those given, fp32."""
    call = Call(sides, d_scores, argmax)
    if not has_data(sides.image):
        return
    d_image, d_text = d_sides
    for of_image, own, other, gradient in (
        (0, call.texts, call.images, d_text),
        (1, call.images, call.texts, d_image),
    ):
        load_kernels().cmli_backward(
            of_image, own, other, call.pairs, address(gradient), gradient.shape[1], call.entries,
            *call.scratch,
        )  # fmt: skip
