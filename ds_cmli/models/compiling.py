"""`torch.compile` of the blocks of the student's encoders, of its shared blocks and of the teacher.

Each block is compiled separately; the code between the blocks (ZeRO's hooks, the losses) is not compiled. Sizes are
dynamic from the start, so that the compiled code does not depend on which batches came first, and a resumed run
computes the same as an uninterrupted one. Dropout draws the same random numbers as without the compiler.
"""

import os
import shutil

import torch
from torch import nn

from ds_cmli.config.schema import Config


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
    return None if problem is None else f"run.compile is 'blocks' and {problem}: install it, or give 'off'"


def compile_blocks(blocks: list[nn.Module], zero_stage: int = 0) -> None:
    """Replace the blocks' forward methods by compiled ones; each is compiled at its first call.

    The method is replaced, not the module, so that parameter names do not change. Under ZeRO-3 each block becomes a
    leaf module, whose parameters are gathered together before it runs: hooks inside it would cause graph breaks.
    """
    for block in blocks:
        block.forward = torch.compile(  # type: ignore[method-assign]
            block.forward, dynamic=True, options={"fallback_random": True}
        )
        if zero_stage == 3:
            from deepspeed.utils import set_z3_leaf_module

            set_z3_leaf_module(block, True)
