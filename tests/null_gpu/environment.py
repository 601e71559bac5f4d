"""The environment in which a Python process has null GPUs."""

import os
from pathlib import Path

from tests.null_gpu.build import library

ROOT = Path(__file__).resolve().parent.parent.parent
# What a launcher, or a user of this machine's own GPUs, may have set.
FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")


def environment(folder: Path, card: str = "a100", count: int = 1) -> dict[str, str]:
    """Return the whole environment of a process with null GPUs.

    Args:
        folder: as `build` returns it.
        card: one of t4, a10g, 3090, 4090, 5090, a100, h100, h200 and b200.
        count: the number of them.
    """
    lib = str(library(folder).parent)
    path = [str(folder / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {name: value for name, value in os.environ.items() if name not in FOREIGN} | {
        "NULLGPU": card,
        "NULLGPU_COUNT": str(count),
        "LD_LIBRARY_PATH": lib,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "OMP_NUM_THREADS": "1",
        "TORCH_CUDNN_V8_API_DISABLED": "1",  # convolutions through the interface that csrc/libraries.c answers
        "TRITON_LIBCUDA_PATH": lib,
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
