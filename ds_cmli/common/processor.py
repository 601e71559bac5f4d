"""What this machine's processor does fast, and how its memory is kept between steps."""

import ctypes
import os
from pathlib import Path

import torch

# oneDNN's levels without products of bf16, as ONEDNN_MAX_CPU_ISA names them.
WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
# Flags of processors that have them: x86 with AVX-512 or AMX, and Arm.
FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def bf16_is_fast() -> bool:
    """Whether this processor multiplies bf16 matrices with instructions of its own, and oneDNN may use them.

    Elsewhere bf16 is computed in fp32 with a conversion at each load: a linear layer then takes two to five times as
    long as in fp32.
    """
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    if limit in WITHOUT_BF16 or not torch.backends.mkldnn.is_available():
        return False
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True  # no Linux: what oneDNN says counts
    lines = (line for line in text.splitlines() if line.startswith(("flags", "Features")))
    return bool(FLAGS & set(next(lines, "").split()))


def keep_freed_memory() -> None:
    """Let glibc's allocator keep what is freed for the next step instead of giving it back to the system.

    Otherwise every large tensor is new memory, whose pages the system clears at their first use: without it the update
    of the weights took twice as long. Another allocator (jemalloc, tcmalloc) is left as it is.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):
        pass  # another C library
