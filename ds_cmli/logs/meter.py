"""Measures the speed of training and its memory."""

import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from ds_cmli.config.registry import compares_tokens
from ds_cmli.data.pairs import Batch
from ds_cmli.distributed.process_group import world_size
from ds_cmli.engine import TrainEngine


class Meter:
    """Measures the speed since the last logged step, without the time of what interrupts training.

    FLOPs are those of the model: the products of its forward passes, without what checkpointing and
    gradient caching compute again. The student's count three times: once for the products, and once
    for the gradient of each factor, as though nothing were frozen.
    """

    def __init__(self, engine: TrainEngine, counts_flops: bool = True):
        """`counts_flops`: False for compiled code, whose operations cannot be counted."""
        self.engine = engine
        self.peak = peak_flops(engine.device, engine.dtype) if counts_flops else 0.0
        self.flops = None if counts_flops else 0  # of a step of this rank; None: not known yet
        self._restart()

    def _restart(self) -> None:
        self.pairs = self.steps = 0
        self.since = time.monotonic()
        self.seconds = {"data": 0.0, "paused": 0.0}

    @contextmanager
    def step(self, micro_batches: Sequence[Batch]) -> Iterator[None]:
        """Enter a step. The FLOPs of the first step are counted, and used for every later step."""
        self.steps += 1
        with ExitStack() as stack:
            if self.flops is None:
                self.flops = sum(all_pairs_flops(self.engine, batch) for batch in micro_batches)
                for module, times in ((self.engine.objective, 3), (self.engine.teacher, 1)):
                    if module is not None:
                        counted = partial(self._counted, module.forward, times)
                        stack.enter_context(mock.patch.object(module, "forward", counted))
            yield

    def _counted(self, forward: Callable, times: int, *arguments: Any, **named: Any) -> Any:
        if named.get("embed"):  # gradient caching computes these features again
            return forward(*arguments, **named)
        with FlopCounterMode(display=False) as counter:
            result = forward(*arguments, **named)
        self.flops = (self.flops or 0) + times * counter.get_total_flops()
        return result

    @contextmanager
    def timed(self, activity: str) -> Iterator[None]:
        """Time the wait for "data", or an interruption of training ("paused")."""
        started = time.monotonic()
        yield
        self.seconds[activity] += time.monotonic() - started

    def lap(self) -> dict[str, float]:
        """Return the columns of a logged step, and begin to count anew."""
        seconds = time.monotonic() - self.since - self.seconds["paused"]
        # The process's memory on a CPU, the allocator's on a GPU.
        memory_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if self.engine.device.type == "cuda":
            memory_bytes = torch.cuda.max_memory_allocated()
        columns = {
            "pairs_per_s": float(f"{self.pairs / seconds:.4g}"),
            "time/data": round(self.seconds["data"] / seconds, 4),
            "peak_memory_bytes": memory_bytes,
        }
        if self.flops:
            flops_per_s = self.flops * self.steps / seconds
            columns["tflops"] = float(f"{flops_per_s / 1e12:.4g}")
            columns["mfu"] = round(flops_per_s / self.peak, 4)
        self._restart()
        return columns


def all_pairs_flops(engine: TrainEngine, batch: Batch) -> int:
    """Return the FLOPs of the all-pairs kernels; 0 if PyTorch counts them.

    The gradient of each side takes as many FLOPs as the similarities.
    """
    objective = engine.objective
    seen = objective.config.cmli_backend == "torch" and not engine.caching
    if seen or not compares_tokens(objective.config.weights):
        return 0
    B, M = batch.input_ids.shape
    N = math.prod(objective.student.grid)
    D = objective.student.embed_dim
    G = B * world_size() * (engine.accumulation if engine.caching else 1)
    return 3 * 2 * B * G * N * M * D


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matrix product on this GPU, measured for half a second."""
    from torch.utils.benchmark import Timer

    x = torch.ones(4096, 4096, device=device, dtype=dtype)
    product = Timer("linear(x, x)", globals={"linear": torch.nn.functional.linear, "x": x})
    seconds = product.blocked_autorange(min_run_time=0.5).median
    del x, product
    torch.cuda.empty_cache()  # the memory of the product is no part of a step
    return 2 * 4096**3 / seconds
