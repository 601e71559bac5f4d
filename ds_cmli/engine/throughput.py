"""Measures where a step's time goes, and how much of the device's peak FLOP/s it uses (MFU).

Nothing here waits for a GPU between two logged steps, and nothing changes what is computed.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

PHASES = ("data", "forward", "loss", "backward", "step", "exchange")
LEAST_MFU = 0.005  # what would be shown as 0% is left out: such steps do not wait for products
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)


class StepTimer:
    """Times each phase since the last `lap`.

    On a GPU it records CUDA events in the stream, and `lap` reads them. "data" is the wait for a
    batch, "forward" that of the models, "loss" the losses (with gradient caching their gradients
    too), "exchange" the exchange of texts between ranks in forward and backward, and "step" the
    update, with the collectives for the weights and for what is left of the gradients.
    """

    def __init__(self) -> None:
        self.marks: list[tuple[str | None, Any]] = []  # (phase that begins, its time or CUDA event)
        self.flops = 0.0  # of this rank, since the last `lap`

    def mark(self, phase: str | None) -> None:
        """End the phase before, and begin this one; None: time that is not counted."""
        if torch.cuda.is_available():
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((phase, now))

    @contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        before = self.marks[-1][0] if self.marks else None
        self.mark(phase)
        yield
        self.mark(before)

    def _seconds(self) -> dict[str, float]:
        seconds = dict.fromkeys(PHASES, 0.0)
        for (phase, begin), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            if torch.cuda.is_available() and not end.query():
                break
            if phase is not None:
                seconds[phase] += _between(begin, end)
        return seconds

    def lap(self, peak: float) -> dict[str, float]:
        """The columns of a logged step: shares of time, TFLOP/s, and MFU from `LEAST_MFU` on.

        Counting begins anew. CPU-GPU sync.

        Args:
            peak: the device's peak FLOP/s; 0 if it is not known.
        """
        if self.marks and torch.cuda.is_available():
            self.marks[-1][1].synchronize()  # CPU-GPU sync
        seconds = self._seconds()
        total = sum(seconds.values())
        flops, self.flops = self.flops, 0.0
        self.marks = self.marks[-1:]
        if not total:
            return {}
        out = {f"time/{phase}": round(value / total, 4) for phase, value in seconds.items()}
        if flops:
            out["tflops"] = float(f"{flops / total / 1e12:.4g}")
            if peak and flops / total / peak >= LEAST_MFU:
                out["mfu"] = round(flops / total / peak, 4)
        return out


def _between(begin: Any, end: Any) -> float:
    """Seconds between two marks."""
    if torch.cuda.is_available():
        return begin.elapsed_time(end) / 1e3
    return end - begin


class ModelFlops(TorchFunctionMode):
    """Counts the FLOPs of the products inside it.

    With `trained` those of the backward pass that will follow are counted too.

    The gradient of each of a product's two operands costs as much as the product; a product with a
    frozen weight is counted once. What activation checkpointing recomputes is not counted, as usual
    for MFU.
    """

    def __init__(self, trained: bool):
        super().__init__()
        self.trained, self.flops = trained, 0.0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # `F.linear`; ZeRO-3 replaces it by a function that calls products.
        if func is torch._C._nn.linear:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self._add(out.numel() * weight.shape[-1], weight.requires_grad)
        elif func in PRODUCTS:
            self._add(out.numel() * args[0].shape[-1])
        elif func in (F.conv2d, torch.conv2d):
            self._add(out.numel() * args[1][0].numel(), args[1].requires_grad)
        elif func is F.scaled_dot_product_attention:
            self._add((args[0].numel() + out.numel()) * args[1].shape[-2])
        elif func is F.multi_head_attention_forward:  # [L, B, H] each, of `nn.MultiheadAttention`
            query, key, value = (x.numel() for x in args[:3])
            inputs = 2 * query + key + value  # of its four projections
            self._add(inputs * args[0].shape[-1], args[11].requires_grad)
            self._add(2 * query * len(args[1]))
        return out

    def _add(self, products: int, both: bool = True) -> None:
        """Add multiplications with their additions; `both`: both operands get a gradient."""
        passes = 3 if self.trained and both else 1
        self.flops += 2.0 * products * passes


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest matrix product of half a second on this device, or of a tenth on a CPU,
    measured once in a process. CPU-GPU sync.

    A GPU's allocator returns all free memory, the product's too, which is no part of a step.
    """
    size, duration_s = (4096, 0.5) if device.type == "cuda" else (512, 0.1)  # a GPU's clocks rise
    x = torch.ones(size, size, device=device, dtype=dtype)
    weight = torch.ones_like(x)
    best, end = float("inf"), time.perf_counter() + duration_s
    while time.perf_counter() < end or best == float("inf"):
        started = time.perf_counter()
        F.linear(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    del x, weight
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return 2.0 * size**3 / best
