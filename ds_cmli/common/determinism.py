"""Bitwise repeatability on one kind of device, by PyTorch's own switches.

What it costs: attention, convolutions and scatter operations take their deterministic kernels, which on a GPU are
slower, and an operation that has none stops the run with its name. On a CPU nothing changes: runs repeat anyway, for
an equal number of threads.
"""

import os


def enforce() -> None:
    """Call before the first GPU operation: cuBLAS reads its workspace setting once."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
