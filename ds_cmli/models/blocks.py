"""How the encoders' and the shared blocks run: recomputed for backward, or compiled.

Both replace a block's forward method and not the module, so that parameter names do not change.

`torch.compile` compiles each block separately; the code between the blocks (ZeRO's hooks, the
losses) is not compiled. Sizes are dynamic from the start, so that the compiled code does not depend
on which batches came first, and a resumed run computes the same as an uninterrupted one. Dropout
draws the same random numbers as without the compiler.
"""

import os
import shutil
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ds_cmli.config.schema import Config
from ds_cmli.models.weights import say

EVERY = 10.0  # seconds between two lines about the progress of compiling


def checkpoint_blocks(blocks: list[nn.Module], checkpoint: Callable) -> None:
    """Wrap each block's forward in `checkpoint(function, *tensors)`, so that only its inputs are
    kept for backward.

    The forward method is replaced, not the module, so that parameter names do not change.
    """
    for block in blocks:
        trained = any(parameter.requires_grad for parameter in block.parameters())
        block.forward = _checkpointed(block.forward, checkpoint, trained)  # type: ignore[method-assign]


def _checkpointed(forward: Callable, checkpoint: Callable, trained: bool) -> Callable:
    """Return `forward` under `checkpoint`; `trained` says whether any of the block's parameters is
    trained.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        leaves, inputs_as = tree_flatten((args, kwargs))
        # Only floating-point tensors can need a gradient, so they are passed to the checkpoint,
        # keyword arguments too (for instance a relative position bias). Masks and flags reach the
        # block through the closure.
        places = [
            i
            for i, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        inputs = [leaves[i] for i in places]
        if not any(x.requires_grad for x in inputs):
            if not trained:
                return forward(*args, **kwargs)
            # The layers below are frozen. Without an input that requires a gradient, the block's
            # parameters get none.
            inputs = [x.detach().requires_grad_() for x in inputs]
        for i in places:
            leaves[i] = (
                # only the checkpoint holds the tensors, so it alone decides when they are freed
                None
            )
        outputs_as: list[Any] = []

        def call(*tensors: Tensor) -> Any:
            filled = list(leaves)
            for i, tensor in zip(places, tensors, strict=True):
                filled[i] = tensor
            again, by_name = tree_unflatten(filled, inputs_as)
            found, structure = tree_flatten(forward(*again, **by_name))
            # For each output: whether it is a tensor, and its value if it is not.
            others = [
                (isinstance(leaf, Tensor), None if isinstance(leaf, Tensor) else leaf)
                for leaf in found
            ]
            outputs_as[:] = [structure, others]
            kept = [leaf for leaf in found if isinstance(leaf, Tensor)]
            return kept[0] if len(kept) == 1 else tuple(kept)

        given = checkpoint(call, *inputs)
        structure, others = outputs_as
        tensors = iter((given,) if isinstance(given, Tensor) else given)
        # A checkpoint returns only tensors; the block's other outputs are put back between them.
        return tree_unflatten(
            [next(tensors) if is_tensor else leaf for is_tensor, leaf in others], structure
        )

    return run


def cannot_compile(config: Config, device: torch.device) -> str | None:
    """The error message if `run.compile` asks for compiled blocks but torch.compile cannot build
    code for the device.

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
    """Tells on rank 0 how many of the blocks have been compiled, at most every `EVERY` seconds and
    at the end.
    """

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

    The method is replaced, not the module, so that parameter names do not change. Under ZeRO-3 each
    block becomes a leaf module, whose parameters are gathered together before it runs: hooks inside
    it would cause graph breaks.
    """
    progress = Progress(len(blocks))
    for block in blocks:
        compiled = torch.compile(block.forward, dynamic=True, options={"fallback_random": True})
        block.forward = progress.counting(compiled)  # type: ignore[method-assign]
        if zero_stage == 3:
            from deepspeed.utils import set_z3_leaf_module

            set_z3_leaf_module(block, True)
