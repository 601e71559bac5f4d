"""Bitwise reproducibility on one kind of device, by PyTorch's own switches.

On a GPU, attention, convolutions and scatter operations then use their deterministic kernels, which are slower; an
operation without such a kernel stops the run with an error that names it. On a CPU nothing changes, because runs with
the same number of threads are reproducible anyway.
"""

import os


def enforce() -> None:
    """Turn it on. Call this before the first GPU operation, because cuBLAS reads its workspace setting only once."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
