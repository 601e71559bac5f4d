"""The GPUs that memory is predicted for, and what a process occupies on one besides tensors.

Capability and multiprocessors are those of NVIDIA's data sheets. Sizes are measured by this project
(`profiling/gpu_check.py` prints them) or assumed: the "total capacity" of published out-of-memory
messages, less than the GPU's name says; nvidia-smi's readings of a process with torch and lazily
loaded kernels, 0.3 to 0.6 GB; and NCCL's, hundreds of MB to over 1 GB a communicator (NVIDIA/nccl
issues 864 and 1685).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ds_cmli.errors import UserError

UNITS = {"": 1, "B": 1, "BYTES": 1, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20}
UNITS["GIB"] = 2**30


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


class Constant(NamedTuple):
    bytes: int
    known: str  # "measured" or "assumed"


@dataclass(frozen=True)
class Gpu:
    name: str
    reported: Sequence[str]  # nvidia-smi's names for it, without "NVIDIA" or "Tesla"
    capability: tuple[int, int]
    multiprocessors: int
    total: Constant  # what the driver reports as the device's memory
    context: Constant  # the CUDA context, with the libraries' kernels that are loaded lazily
    nccl: Constant  # buffers of one communicator, outside torch's allocator

    @property
    def threads(self) -> int:
        """Return how many threads a multiprocessor runs at a time."""
        return BY_CAPABILITY[self.capability][0]

    @property
    def shared(self) -> int:
        """Return the bytes of shared memory that a block may ask for."""
        return BY_CAPABILITY[self.capability][1] * 1024

    def cublas_bytes(self, workspace_config: str | None = None) -> int:
        """Return the bytes that cuBLAS takes from torch's allocator, for both threads of a step.

        `workspace_config` is CUBLAS_WORKSPACE_CONFIG, pairs of KiB and count like ":4096:2:16:8",
        as `parseChosenWorkspaceSize` of PyTorch's CublasHandlePool.cpp reads it; its default is
        ":4096:8" from sm_90 on.
        """
        pairs = re.findall(r":([0-9]+):([0-9]+)", workspace_config or "")
        pairs = pairs or ([(4096, 8)] if self.capability >= (9, 0) else [(4096, 2), (16, 8)])
        return 2 * sum(int(kib) * 1024 * int(count) for kib, count in pairs)

    def outside(self, communicators: int) -> int:
        """Return the bytes outside torch's allocator, with so many NCCL communicators."""
        return self.context.bytes + communicators * self.nccl.bytes


# Compute capability, multiprocessors, MiB in all, of context and of NCCL (a: assumed, m: measured),
# name: nvidia-smi's names
_TABLE = """
7.5   40  14912.3125a  300a   300a  T4 16GB: T4
7.0   80  16150a       300a   300a  V100 16GB: V100-SXM2-16GB, V100-PCIE-16GB, V100-FHHL-16GB
7.0   80  32500a       300a   300a  V100 32GB: V100-SXM2-32GB, V100-PCIE-32GB, V100S-PCIE-32GB
8.6   72  22589a       300a   300a  A10 24GB: A10
8.6   80  22589a       300a   300a  A10G 24GB: A10G
8.9   58  22574a       300a   300a  L4 24GB: L4
8.6   82  24248a       300a   300a  RTX 3090 24GB: GeForce RTX 3090
8.9  128  24197a       350a   300a  RTX 4090 24GB: GeForce RTX 4090
12.0 170  32112a       350a   300a  RTX 5090 32GB: GeForce RTX 5090
8.6   84  45410a       350a   300a  A40 48GB: A40
8.6   84  48570a       350a   300a  A6000 48GB: RTX A6000
8.9  142  45480a       350a   300a  L40S 48GB: L40S
8.0  108  40325a       450a   600a  A100 40GB: A100-SXM4-40GB, A100-PCIE-40GB
8.0  108  81039a       450a   600a  A100 80GB: A100-SXM4-80GB, A100 80GB PCIe
9.0  114  80998a       550a  1000a  H100 PCIe 80GB: H100 PCIe
9.0  132  80998a       550a  1000a  H100 80GB: H100 80GB HBM3
9.0  132  95232a       550a  1000a  H100 NVL 94GB: H100 NVL
9.0  132  143155a      550a  1000a  H200 141GB: H200, H200 NVL
9.0  132  96768a       550a  1000a  GH200 96GB: GH200 480GB
9.0  132  146000a      550a  1000a  GH200 144GB: GH200 144G HBM3e
10.0 148  182630a      550a  1000a  B200 180GB: B200
"""


def _read(row: str) -> Gpu:
    sm, multiprocessors, *sizes, names = row.split(maxsplit=5)
    major, minor = map(int, sm.split("."))
    name, reported = names.split(": ")
    marks = {"a": "assumed", "m": "measured"}
    constants = [Constant(int(float(x[:-1]) * 2**20), marks[x[-1]]) for x in sizes]
    return Gpu(name, reported.split(", "), (major, minor), int(multiprocessors), *constants)


def _key(name: str) -> str:
    return " ".join(word for word in name.lower().split() if word not in MAKER)


MAKER = ("nvidia", "tesla", "geforce")
GPUS = {gpu.name: gpu for gpu in map(_read, _TABLE.strip().splitlines())}
_BY_NAME = {_key(name): gpu for gpu in GPUS.values() for name in (gpu.name, *gpu.reported)}
DEFAULT = "RTX 3090 24GB"  # where there is none: the source document says 24 GB and no name


def find(name: str, setting: str = "--gpu") -> Gpu:
    """Return the GPU with this name, the table's or nvidia-smi's; no other one in its place."""
    gpu = _BY_NAME.get(_key(name))
    if gpu is None:
        raise UserError(
            f"{setting} is {name!r}, which is not listed: give one of {', '.join(GPUS)}, or its "
            "memory and compute capability, as --gpu-memory 48GB --sm 8.9"
        )
    return gpu


def of_device(
    name: str, capability: tuple[int, int], multiprocessors: int, total_bytes: int
) -> Gpu:
    """Return the GPU with this name, or an unlisted one with what its driver reports.

    All else of an unlisted one is assumed: as of the listed GPU with the most multiprocessors, of
    its compute capability or the next lower one that is listed.
    """
    listed = _BY_NAME.get(_key(name))
    if listed is not None:
        return listed
    nearest = max(known for known in BY_CAPABILITY if known <= capability)
    return replace(
        _largest(nearest),
        name=name,
        reported=(name,),
        multiprocessors=multiprocessors,
        total=Constant(total_bytes, "reported"),
    )


def _largest(capability: tuple[int, int]) -> Gpu:
    alike = [gpu for gpu in GPUS.values() if gpu.capability == capability]
    return max(alike, key=lambda gpu: gpu.multiprocessors)


def of_size(memory: str, sm: str) -> Gpu:
    """Return an unlisted GPU of `memory` like "48GB" and compute capability `sm` like "8.9".

    All else is assumed: as of the listed GPU of its capability with the most multiprocessors.
    """
    total = parse_bytes(memory)
    if not total:
        raise UserError(f"--gpu-memory is {memory!r}: give a size, for instance 48GB or 44GiB")
    capabilities = {"{}.{}".format(*capability): capability for capability in BY_CAPABILITY}
    if sm not in capabilities:
        raise UserError(f"--sm is {sm!r}: give one of {', '.join(capabilities)}")
    name = f"GPU of {memory}, sm {sm}"
    total_memory = Constant(total, "given")
    return replace(_largest(capabilities[sm]), name=name, reported=(), total=total_memory)


def chosen(gpu: str | None, memory: str | None, sm: str | None) -> Gpu | None:
    """Return the GPU of the options --gpu, --gpu-memory and --sm; None: none of them is given."""
    if memory is None and sm is None:
        return None if gpu is None else find(gpu)
    if gpu is not None or memory is None or sm is None:
        raise UserError("--gpu-memory and --sm are given together, and in place of --gpu")
    return of_size(memory, sm)


def parse_bytes(text: str) -> int | None:
    """ "24GB" -> 24 * 10^9; None: it is no size."""
    number = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([a-zA-Z]*)\s*", text)
    if number is None or number[2].upper() not in UNITS:
        return None
    return int(float(number[1]) * UNITS[number[2].upper()])
