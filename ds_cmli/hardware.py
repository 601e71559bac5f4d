"""Properties and settings of this machine: bf16, the host's allocator, reproducibility."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

# The values of ONEDNN_MAX_CPU_ISA with which oneDNN uses no bf16 instructions.
WITHOUT_BF16 = "SSE41 AVX AVX2 AVX2_VNNI AVX2_VNNI_2 AVX512_CORE AVX512_CORE_VNNI"
# Flags in /proc/cpuinfo of processors with bf16 instructions: x86 with AVX-512 or AMX, and Arm.
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
DETERMINISTIC_CUBLAS = ":4096:8"  # the CUBLAS_WORKSPACE_CONFIG with which cuBLAS is deterministic
M_TRIM_THRESHOLD = -1  # of glibc's malloc.h, as the next one
M_MMAP_MAX = -4


def onednn_limit() -> str:
    """Return the instructions that the environment limits oneDNN to; "": no limit."""
    return os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()


def bf16_is_fast() -> bool:
    """Return True if this processor has instructions for bf16 matrices that oneDNN may use.

    Other processors compute bf16 in fp32 and convert at each load, so that a linear layer takes two
    to five times as long as in fp32.
    """
    import torch

    if onednn_limit() in WITHOUT_BF16.split() or not torch.backends.mkldnn.is_available():
        return False
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else BF16_FLAGS
    return bool(BF16_FLAGS & words) and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def cpu_line() -> str:
    """Return a line about what decides this processor's speed: instructions and threads."""
    import torch

    instructions = onednn_limit() or torch.backends.cpu.get_cpu_capability()
    bf16 = "with" if bf16_is_fast() else "without"
    return f"device: cpu, {instructions} {bf16} bf16, {torch.get_num_threads()} threads"


def keep_freed_memory() -> None:
    """Let glibc's allocator keep freed memory for the next step.

    Otherwise every large tensor gets new pages, which the system clears at their first use; the
    update of the weights then took twice as long.
    """
    with suppress(OSError, AttributeError):  # the C library is not glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def one_attention_on_all_gpus() -> None:
    """Leave cuDNN's attention out of PyTorch's choice of a kernel, in this process.

    PyTorch prefers it from sm_90 on, and no other GPU has it: without it a run has the same bits,
    and its memory the same prediction, on all GPUs from sm_80 on.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def enforce_determinism() -> None:
    """Make results bitwise reproducible on one kind of device, by PyTorch's own switches.

    On a GPU, attention, convolutions and scatter operations then use their deterministic kernels,
    which are slower; an operation without such a kernel stops the run with an error that names it.
    On a CPU nothing changes, because runs with the same number of threads are reproducible anyway.
    To be called before the first GPU operation, as cuBLAS reads its workspace setting once.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", DETERMINISTIC_CUBLAS)
    import torch

    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
