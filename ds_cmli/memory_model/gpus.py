"""The memory of each listed GPU, and what a process occupies on it besides torch's tensors.

Reads `gpus.json`.

Every amount is in bytes. It states whether this project has measured it (`profiling/gpu_check.py`
prints measured values) or assumes it, and its source. Compute capability and the number of
multiprocessors are those of NVIDIA's data sheets.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ds_cmli.common.errors import UserError

if TYPE_CHECKING:  # commands read the list before they import torch
    import torch

MEASURED, ASSUMED = "measured", "assumed"
UNITS = {"": 1, "B": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Constant:
    bytes: int
    known: str  # MEASURED or ASSUMED
    source: str


class Limits(NamedTuple):
    """What decides how much of its memory a GPU's operators take for themselves."""

    capability: tuple[int, int]
    multiprocessors: int
    threads: int  # that a multiprocessor runs at a time
    shared: int  # bytes of shared memory that a block may ask for

    @classmethod
    def of(cls, device: "torch.device") -> "Limits":
        """The limits of a GPU in this machine."""
        import torch

        properties = torch.cuda.get_device_properties(device)
        most = properties.shared_memory_per_block
        return cls(
            (properties.major, properties.minor),
            properties.multi_processor_count,
            properties.max_threads_per_multi_processor,
            getattr(properties, "shared_memory_per_block_optin", most),
        )


# The CUDA C++ Programming Guide's "Technical Specifications per Compute Capability": threads of a
# multiprocessor, and KiB of shared memory of a block.
BY_CAPABILITY = {
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
    capability: tuple[int, int]
    multiprocessors: int
    total: Constant  # what the driver reports as the device's memory
    context: Constant  # the CUDA context, with the libraries' kernels that are loaded lazily
    cublas_workspace: Constant  # from torch's allocator, in its allocated and reserved bytes
    nccl: Constant  # buffers of one communicator, outside torch's allocator

    @property
    def limits(self) -> Limits:
        threads, shared = BY_CAPABILITY[self.capability]
        return Limits(self.capability, self.multiprocessors, threads, shared * 1024)

    def cublas_bytes(self, workspace_config: str | None = None) -> int:
        """What cuBLAS takes from torch's allocator, for the forward thread and autograd's.

        `workspace_config` is CUBLAS_WORKSPACE_CONFIG, pairs of KiB and count like ":4096:2:16:8",
        as `parseChosenWorkspaceSize` of PyTorch's CublasHandlePool.cpp reads it.
        """
        pairs = re.findall(r":([0-9]+):([0-9]+)", workspace_config or "")
        if not pairs:
            return self.cublas_workspace.bytes
        return 2 * sum(int(kib) * 1024 * int(count) for kib, count in pairs)

    @property
    def usable(self) -> int:
        """What a single process can reserve for tensors."""
        return self.total.bytes - self.context.bytes

    @property
    def nominal(self) -> tuple[int, int]:
        """The size that its name states, in GB and in GiB: the driver reports another."""
        number = int(self.name.rpartition(" ")[2].removesuffix("GB"))
        return number * UNITS["GB"], number * UNITS["GIB"]


@cache
def all_gpus() -> dict[str, Gpu]:
    gpus = {}
    for name, values in json.loads((Path(__file__).parent / "gpus.json").read_text()).items():
        major, minor = values.pop("capability")
        multiprocessors = values.pop("multiprocessors")
        constants = {key: Constant(**constant) for key, constant in values.items()}
        gpus[name] = Gpu(name, (major, minor), multiprocessors, **constants)
    return gpus


def find(name: str) -> Gpu:
    """The listed GPU that `name` means: "A10G", "A100 80GB", or torch's "NVIDIA H100 80GB HBM3".

    Raises `UserError` if no GPU or more than one fits.
    """
    given = set(name.lower().replace("-", " ").split()) - {"nvidia", "geforce", "tesla"}
    listed = {key: set(key.lower().split()) for key in all_gpus()}
    fitting = [key for key, words in listed.items() if words <= given]
    if not fitting and given:
        fitting = [key for key, words in listed.items() if given <= words]
    if len(fitting) != 1:
        raise UserError(f"--gpu is {name!r}: give one of {', '.join(listed)}")
    return all_gpus()[fitting[0]]


def listed_name(name: str) -> str:
    """The listed name of the GPU that `name` means, or "" if there is none."""
    try:
        return find(name).name
    except UserError:
        return ""


def parse_memory(text: str, setting: str = "--fit") -> tuple[int, str | None]:
    """ "24GB" -> (24 * 10^9, None); a GPU's name -> (its memory in bytes, the name)."""
    number = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", text)
    if number and number[2].upper() in UNITS:
        try:
            return int(float(number[1]) * UNITS[number[2].upper()]), None
        except ValueError:
            pass
    try:
        gpu = find(text)
    except UserError:
        raise UserError(
            f"{setting} is {text!r}: give a size, for instance 24GB (10^9 bytes) or 22GiB, or one "
            f"of {', '.join(all_gpus())}"
        ) from None
    return gpu.total.bytes, gpu.name


def device_bytes(reserved: int, name: str, world_size: int) -> int:
    """The bytes that the process occupies on the device, as nvidia-smi shows them.

    Args:
        reserved: what the caching allocator has reserved, the cuBLAS workspace included.
        name: the GPU, as `find` takes it.
        world_size: above 1, one NCCL communicator is added, which ZeRO and the losses share.
    """
    gpu = find(name)
    return reserved + gpu.context.bytes + (gpu.nccl.bytes if world_size > 1 else 0)
