"""`torch.compile` of the blocks of the student's encoders, of its shared blocks and of the teacher.

Each block is compiled for itself: what is between the blocks (ZeRO's hooks, the losses) stays as it is. Sizes are
dynamic from the start, so that what is compiled does not depend on which batches came first, and a resumed run computes
as an unbroken one does. Dropout draws what it draws without the compiler.
"""

import os
import shutil

import torch
from torch import nn

from ds_cmli.config.schema import Config


def cannot_compile(config: Config, device: torch.device) -> str | None:
    """What to tell where blocks are to be compiled and torch.compile cannot make code for the device."""
    if config.run.compile == "off":
        return None
    problem = None
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            problem = "Triton does not run here"
    elif shutil.which(os.environ.get("CXX", "g++")) is None:
        problem = f"there is no C++ compiler {os.environ.get('CXX', 'g++')!r} (CXX)"
    return None if problem is None else f"run.compile is 'blocks' and {problem}: install it, or give 'off'"


def compile_blocks(blocks: list[nn.Module], zero_stage: int = 0) -> None:
    """Compile the blocks' forward methods, at their first call.

    The method is replaced and not the module, so that parameter names stay as they are. ZeRO-3 then gathers a block's
    parameters before the block as a whole, as hooks within it would break what is compiled into pieces.
    """
    for block in blocks:
        block.forward = torch.compile(  # type: ignore[method-assign]
            block.forward, dynamic=True, options={"fallback_random": True}
        )
        if zero_stage == 3:
            from deepspeed.utils import set_z3_leaf_module

            set_z3_leaf_module(block, True)
