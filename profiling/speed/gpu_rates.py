"""Rates of GPUs, and the least time that they allow for what kernels do."""

from typing import NamedTuple

from ds_cmli.allocator import gpus

EFFICIENCY = 0.55  # share of the limits that kernels are assumed to reach


class GPU(NamedTuple):
    """Rates a second, of the manufacturer's whitepapers; those of L2 were measured by others, and are assumed here."""

    capability: int
    shared: int  # bytes of shared memory of a block
    flops: float  # 16-bit products with fp32 sums, dense
    dram: float  # bytes
    l2: float
    instructions: float  # warp instructions: four of each multiprocessor and cycle


GPUS = {
    "rtx3090": GPU(86, 99 * 1024, 71e12, 936e9, 2.0e12, 82 * 4 * 1.695e9),
    "rtx4090": GPU(89, 99 * 1024, 165e12, 1008e9, 4.0e12, 128 * 4 * 2.52e9),
    "a100": GPU(80, 163 * 1024, 312e12, 2039e9, 4.5e12, 108 * 4 * 1.41e9),
    "h100": GPU(90, 227 * 1024, 989e12, 3350e9, 5.6e12, 132 * 4 * 1.755e9),
}


def rates_of(name: str) -> GPU | None:
    """The rates of the GPU that `name` means in `allocator.gpus`, None if they are not listed here."""
    without_memory = gpus.find(name).name.rpartition(" ")[0]
    return GPUS.get(without_memory.replace(" ", "").lower())


class Work(NamedTuple):
    """What kernels do that run at the same time."""

    flops: float
    dram: float
    l2: float
    instructions: float = 0.0

    def times(self, gpu: GPU) -> dict[str, float]:
        """Milliseconds that each limit allows at best; the largest is the time at the limits."""
        rates = (gpu.flops, gpu.dram, gpu.l2, gpu.instructions)
        names = ("tensor cores", "DRAM", "L2", "instructions")
        return {
            name: 1e3 * amount / rate for name, amount, rate in zip(names, self, rates, strict=True)
        }


def at_limits(phases: list[Work], gpu: GPU) -> float:
    """Milliseconds at best of phases that follow each other."""
    return sum(max(work.times(gpu).values()) for work in phases)
