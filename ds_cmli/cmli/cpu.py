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

from .sides import Directions, SidePair, Sides, has_data

SOURCE = Path(__file__).with_name("cpu.cpp")
COMPILER_FLAGS = "-std=c++17 -O3 -fno-trapping-math -fno-math-errno -fopenmp"
AVX512_FLAGS = "-mavx512f -mavx512dq -mfma -mprefer-vector-width=512"
VECTOR_FLAGS = {"AVX512": AVX512_FLAGS, "AVX2": "-mavx2 -mfma"}
MAX_BLOCK_BYTES = 2**19  # of the features of a thread's block of images
MAX_ENTRIES = 2**14  # rows that a thread lists to add them
MAX_SERIAL = 2**24  # multiplications for which other threads are not woken
# Constants of cpu.cpp: MIN_TOKENS, and the maxima of ROWS and L.
MIN_TOKENS = 64
MAX_ROWS = 8
MAX_LANES = 16


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
    vector_flags = VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), "")
    return compiled(SOURCE, f"{COMPILER_FLAGS} {vector_flags}".split())


def call(
    function: str,
    sides: Sides,
    scores: Directions,
    argmax: Directions | None,
    d_sides: SidePair | None = None,
) -> None:
    """Allocate the scratch memory of a function of cpu.cpp, and call it unless there is no data.

    `scores` are their gradients if the gradients of the features, `d_sides`, are computed.
    """
    images = side_tensors(sides.image, sides.patch_mask)
    texts = side_tensors(sides.text, sides.token_mask)
    I, N, D = sides.image.shape  # noqa: E741
    J, M, _ = sides.text.shape
    # Patches of a block, at least those of an image; rows of a list, at least those of a pair.
    block_rows = max(N, MAX_BLOCK_BYTES // (4 * D))
    max_entries = max(N + M, MAX_ENTRIES)
    columns = block_rows + MAX_LANES
    max_tokens = max(MIN_TOKENS, M)
    floats = columns * (D + max_tokens + MAX_ROWS + 2) + 2 * (max_tokens + MAX_LANES)
    forward_bytes = 4 * floats + 16 * max_tokens
    backward_bytes = 8 * max_entries + 4 * (max(N, M) + 1)
    thread_bytes = -(-max(forward_bytes, backward_bytes) // 64) * 64
    threads = min(I, torch.get_num_threads())
    scratch = sides.image.new_empty(thread_bytes * threads, dtype=torch.uint8)
    if I * N * J * M * D < MAX_SERIAL:
        threads = 1
    if not has_data(sides.image):
        return
    nulls = (None, None)
    results = (*scores, *(argmax or nulls), *(d_sides or nulls))
    index_bytes = [x.itemsize for x in argmax] if argmax else [0, 0]
    # The fields of `Call` in cpu.cpp, 8 bytes each.
    fields = [
        *(*map(address, images), *sides.image.shape),
        *(*map(address, texts), *sides.text.shape),
        *map(address, (*results, scratch)),
        *(*index_bytes, thread_bytes, threads, block_rows, max_entries),
    ]
    load_kernels()[function]((ctypes.c_int64 * len(fields))(*fields))


forward = functools.partial(call, "cmli_forward")
backward = functools.partial(call, "cmli_backward")


def side_tensors(features: Tensor, mask: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the features in fp32, the mask, and memory for the positions and ends of rows."""
    B, P, _ = features.shape
    features = features.float().contiguous()
    mask = None if mask is None else mask.contiguous()
    positions = features.new_empty(B * P, dtype=torch.int64)
    return features, mask, positions, features.new_empty(B, dtype=torch.int32)


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
