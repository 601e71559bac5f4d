"""`torch.compile` of the blocks of the student's encoders, of its shared blocks and of the teacher.

Each block is compiled separately; the code between the blocks (ZeRO's hooks, the losses) is not compiled. Sizes are
dynamic from the start, so that the compiled code does not depend on which batches came first, and a resumed run
computes the same as an uninterrupted one. Dropout draws the same random numbers as without the compiler.
"""

import os
import shutil
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ds_cmli.config.schema import Config
from ds_cmli.models.weights import say

EVERY = 10.0  # seconds


def cannot_compile(config: Config, device: torch.device) -> str | None:
    """The error message if `run.compile` asks for compiled blocks but torch.compile cannot build code for the device.

    None if there is no problem.
    """
    if config.run.compile == "off":
        return None
    problem = None
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            problem = "Triton does not run here"
    elif shutil.which(os.environ.get("CXX", "g++")) is None:
        problem = f"there is no C++ compiler {os.environ.get('CXX', 'g++')!r} (CXX)"
    return (
        None
        if problem is None
        else f"run.compile is 'blocks' and {problem}: install it, or give 'off'"
    )


class Progress:
    """Tells on rank 0 how many of the blocks have been compiled, at most every `EVERY` seconds and at the end."""

    def __init__(self, total: int):
        self.total, self.done = total, 0
        self.started = self.told = 0.0

    def counting(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        first = True

        def call(*inputs: Any, **keywords: Any) -> Any:
            nonlocal first
            if not first:
                return forward(*inputs, **keywords)
            first = False
            if not self.done:
                self.started = self.told = time.monotonic()
                say(
                    f"compiling the {self.total} blocks, in the first step: seconds to minutes for each"
                )
            result = forward(*inputs, **keywords)
            self.done += 1
            now = time.monotonic()
            if self.done == self.total or now - self.told > EVERY:
                self.told = now
                say(
                    f"compiled {self.done} of {self.total} blocks (forward) in {now - self.started:.0f} s"
                )
            return result

        return call


def compile_blocks(blocks: list[nn.Module], zero_stage: int = 0) -> None:
    """Replace the blocks' forward methods by compiled ones; each is compiled at its first call.

    The method is replaced, not the module, so that parameter names do not change. Under ZeRO-3 each block becomes a
    leaf module, whose parameters are gathered together before it runs: hooks inside it would cause graph breaks.
    """
    progress = Progress(len(blocks))
    for block in blocks:
        compiled = torch.compile(block.forward, dynamic=True, options={"fallback_random": True})
        block.forward = progress.counting(compiled)  # type: ignore[method-assign]
        if zero_stage == 3:
            from deepspeed.utils import set_z3_leaf_module

            set_z3_leaf_module(block, True)
