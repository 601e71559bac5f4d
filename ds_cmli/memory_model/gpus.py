"""The GPUs that memory is predicted for, and what a process occupies on one besides tensors.

Capability and multiprocessors are those of NVIDIA's data sheets. Sizes are assumed;
`profiling/gpu_check.py` prints those of a GPU.
 - Total: the "total capacity" of published out-of-memory messages. It is less than the name says.
 - Context: nvidia-smi's readings of a process with torch and lazily loaded kernels, 0.3 to 0.6 GB.
 - NCCL: hundreds of MB to over 1 GB a communicator (NVIDIA/nccl issues 864 and 1685).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ds_cmli.errors import UserError

UNITS = {"": 1, "B": 1, "BYTES": 1, "MB": 10**6, "GB": 10**9}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
BRAND_WORDS = ("nvidia", "tesla", "geforce")  # names of GPUs are compared without them
# The CUDA C++ Programming Guide's "Technical Specifications per Compute Capability": threads of a
# multiprocessor, and KiB of shared memory of a block.
BY_CAPABILITY = {
    (7, 0): (2048, 96),
    (7, 5): (1024, 64),
    (8, 0): (2048, 163),
    (8, 6): (1536, 99),
    (8, 9): (1536, 99),
    (9, 0): (2048, 227),
    (10, 0): (2048, 227),
    (12, 0): (1536, 99),
}


@dataclass(frozen=True)
class Gpu:
    name: str
    reported_names: Sequence[str]  # those of nvidia-smi, without "NVIDIA" or "Tesla"
    capability: tuple[int, int]
    multiprocessors: int
    total_bytes: int  # what the driver reports as the device's memory
    context_bytes: int  # the CUDA context, with the libraries' kernels that are loaded lazily
    nccl_bytes: int  # buffers of one communicator, outside torch's allocator

    @property
    def max_threads(self) -> int:
        """Return how many threads a multiprocessor runs at a time."""
        threads, _ = BY_CAPABILITY[self.capability]
        return threads

    @property
    def shared_bytes(self) -> int:
        """Return the bytes of shared memory that a block may ask for."""
        _, kib = BY_CAPABILITY[self.capability]
        return kib * 1024

    def cublas_bytes(self, workspace_config: str | None = None) -> int:
        """Return the bytes of a workspace that cuBLAS takes from torch's allocator.

        `workspace_config` is CUBLAS_WORKSPACE_CONFIG, pairs of KiB and count like ":4096:2:16:8",
        as `parseChosenWorkspaceSize` of PyTorch's CublasHandlePool.cpp reads it; its default is
        ":4096:8" from sm_90 on.
        """
        pairs = re.findall(r":([0-9]+):([0-9]+)", workspace_config or "")
        pairs = pairs or ([(4096, 8)] if self.capability >= (9, 0) else [(4096, 2), (16, 8)])
        return sum(int(kib) * 1024 * int(count) for kib, count in pairs)

    def outside_bytes(self, num_communicators: int) -> int:
        """Return the bytes outside torch's allocator: the context and NCCL's communicators."""
        return self.context_bytes + num_communicators * self.nccl_bytes


# Columns: compute capability, multiprocessors, total MiB, context MiB, NCCL MiB, and
# "name: nvidia-smi's names".
_TABLE = """
7.5   40  14912.3125  300   300  T4 16GB: T4
7.0   80  16150       300   300  V100 16GB: V100-SXM2-16GB, V100-PCIE-16GB, V100-FHHL-16GB
7.0   80  32500       300   300  V100 32GB: V100-SXM2-32GB, V100-PCIE-32GB, V100S-PCIE-32GB
8.6   72  22589       300   300  A10 24GB: A10
8.6   80  22589       300   300  A10G 24GB: A10G
8.9   58  22574       300   300  L4 24GB: L4
8.6   82  24248       300   300  RTX 3090 24GB: GeForce RTX 3090
8.9  128  24197       350   300  RTX 4090 24GB: GeForce RTX 4090
12.0 170  32112       350   300  RTX 5090 32GB: GeForce RTX 5090
8.6   84  45410       350   300  A40 48GB: A40
8.6   84  48570       350   300  A6000 48GB: RTX A6000
8.9  142  45480       350   300  L40S 48GB: L40S
8.0  108  40325       450   600  A100 40GB: A100-SXM4-40GB, A100-PCIE-40GB
8.0  108  81039       450   600  A100 80GB: A100-SXM4-80GB, A100 80GB PCIe
9.0  114  80998       550  1000  H100 PCIe 80GB: H100 PCIe
9.0  132  80998       550  1000  H100 80GB: H100 80GB HBM3
9.0  132  95232       550  1000  H100 NVL 94GB: H100 NVL
9.0  132  143155      550  1000  H200 141GB: H200, H200 NVL
9.0  132  96768       550  1000  GH200 96GB: GH200 480GB
9.0  132  146000      550  1000  GH200 144GB: GH200 144G HBM3e
10.0 148  182630      550  1000  B200 180GB: B200
"""


def _parse_row(row: str) -> Gpu:
    sm, multiprocessors, *sizes, names = row.split(maxsplit=5)
    major, minor = map(int, sm.split("."))
    name, reported = names.split(": ")
    sizes_bytes = [int(float(mib) * 2**20) for mib in sizes]
    return Gpu(name, reported.split(", "), (major, minor), int(multiprocessors), *sizes_bytes)


def _without_brand(name: str) -> str:
    return " ".join(word for word in name.lower().split() if word not in BRAND_WORDS)


GPUS = {gpu.name: gpu for gpu in map(_parse_row, _TABLE.strip().splitlines())}
_BY_NAME = {
    _without_brand(name): gpu for gpu in GPUS.values() for name in (gpu.name, *gpu.reported_names)
}
DEFAULT = "RTX 3090 24GB"  # if no GPU is named: the document of the estimates says 24 GB alone


def find(name: str, setting: str = "--gpu") -> Gpu:
    """Return the GPU with this name, the table's or nvidia-smi's. Raises `UserError`."""
    gpu = _BY_NAME.get(_without_brand(name))
    if gpu is None:
        raise UserError(
            f"{setting} is {name!r}, which is not listed: give one of {', '.join(GPUS)}, or its "
            "memory and compute capability, as --gpu-memory 48GB --sm 8.9"
        )
    return gpu


def of_device(properties: Any) -> Gpu:
    """Return the GPU of `torch.cuda.get_device_properties`: the listed one, or an unlisted one.

    An unlisted one takes what the properties do not say from the listed GPU with the most
    multiprocessors of its compute capability, or of the next lower one that is listed.
    """
    listed = _BY_NAME.get(_without_brand(properties.name))
    if listed is not None:
        return listed
    capability = (properties.major, properties.minor)
    nearest = max(candidate for candidate in BY_CAPABILITY if candidate <= capability)
    return replace(
        _largest(nearest),
        name=properties.name,
        reported_names=(properties.name,),
        multiprocessors=properties.multi_processor_count,
        total_bytes=properties.total_memory,
    )


def _largest(capability: tuple[int, int]) -> Gpu:
    candidates = [gpu for gpu in GPUS.values() if gpu.capability == capability]
    return max(candidates, key=lambda gpu: gpu.multiprocessors)


def from_options(gpu: str | None, memory: str | None, sm: str | None) -> Gpu | None:
    """Return the GPU of the options --gpu, --gpu-memory and --sm; None: none of them is given.

    An unlisted GPU takes all else from the listed GPU with the most multiprocessors of its
    capability. Raises `UserError`.
    """
    if memory is None and sm is None:
        return None if gpu is None else find(gpu)
    if gpu is not None or memory is None or sm is None:
        raise UserError("--gpu-memory and --sm are given together, and in place of --gpu")
    total_bytes = parse_bytes(memory)
    if not total_bytes:
        raise UserError(f"--gpu-memory is {memory!r}: give a size, for instance 48GB or 44GiB")
    capabilities = {"{}.{}".format(*capability): capability for capability in BY_CAPABILITY}
    if sm not in capabilities:
        raise UserError(f"--sm is {sm!r}: give one of {', '.join(capabilities)}")
    name = f"GPU of {memory}, sm {sm}"
    nearest = _largest(capabilities[sm])
    return replace(nearest, name=name, reported_names=(), total_bytes=total_bytes)


def parse_bytes(text: str) -> int | None:
    """Return the bytes of a size like "24GB"; None if the text is not a size."""
    match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        return None
    number, unit = match.groups()
    return int(float(number) * UNITS[unit.upper()])
