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
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ds_cmli.config.schema import Config
from ds_cmli.models.weights import say

EVERY = 10.0  # seconds between two lines about the progress of compiling


def checkpoint_blocks(blocks: list[nn.Module], checkpoint: Callable) -> None:
    """Wrap each block's forward in `checkpoint(function, *tensors)`, which keeps its inputs alone.

    The forward method is replaced, not the module, so that parameter names do not change.
    """
    for block in blocks:
        block.forward = _checkpointed(block.forward, checkpoint)  # type: ignore[method-assign]
        _give_gradient(block)


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, Tensor)


def _is_float(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _checkpointed(forward: Callable, checkpoint: Callable) -> Callable:
    """Return `forward` under `checkpoint`, where an input requires a gradient."""

    def run(*args: object, **kwargs: object) -> object:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        leaves, inputs_as = tree_flatten((args, kwargs))
        # Only floating-point tensors can need a gradient, so they are passed to the checkpoint,
        # keyword arguments too (for instance a relative position bias). Masks and flags reach the
        # block through the closure.
        places = [i for i, leaf in enumerate(leaves) if _is_float(leaf)]
        inputs = [leaves[i] for i in places]
        if not any(x.requires_grad for x in inputs):
            return forward(*args, **kwargs)
        # Only the checkpoint holds the tensors, so it alone decides when they are freed.
        for i in places:
            leaves[i] = None
        structure: TreeSpec | None = None
        # For each output: whether it is a tensor, and its value if it is not.
        others: list[tuple[bool, object]] = []

        def call(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
            nonlocal structure, others
            filled = list(leaves)
            for i, tensor in zip(places, tensors, strict=True):
                filled[i] = tensor
            again, by_name = tree_unflatten(filled, inputs_as)
            outputs, structure = tree_flatten(forward(*again, **by_name))
            others = [(True, None) if _is_tensor(leaf) else (False, leaf) for leaf in outputs]
            kept = [leaf for leaf in outputs if _is_tensor(leaf)]
            return kept[0] if len(kept) == 1 else tuple(kept)

        given = checkpoint(call, *inputs)
        assert structure is not None
        tensors = iter((given,) if _is_tensor(given) else given)
        # A checkpoint returns only tensors; the block's other outputs are put back between them.
        whole = [next(tensors) if is_tensor else leaf for is_tensor, leaf in others]
        return tree_unflatten(whole, structure)

    return run


def cannot_compile(config: Config, device: torch.device) -> str | None:
    """Why torch.compile cannot build code for the device, as an error message.

    None if it can, or if `run.compile` does not ask for it.
    """
    if config.run.compile == "off":
        return None
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if has_triton():
            return None
        problem = "Triton does not run here"
    elif shutil.which(compiler) is not None:
        return None
    else:
        problem = f"there is no C++ compiler {compiler!r} (CXX)"
    return f"run.compile is 'blocks' and {problem}: install it, or give 'off'"


class CompileProgress:
    """Tells on rank 0 how many blocks have been compiled, at most every `EVERY` seconds."""

    def __init__(self, total: int):
        self.total, self.done = total, 0
        self.started = self.told = 0.0

    def counting(self, forward: Callable[..., object]) -> Callable[..., object]:
        first = True

        def call(*inputs: object, **keywords: object) -> object:
            nonlocal first
            if not first:
                return forward(*inputs, **keywords)
            first = False
            if not self.done:
                self.started = self.told = time.monotonic()
                minutes = "seconds to minutes for each"
                say(f"compiling the {self.total} blocks, in the first step: {minutes}")
            result = forward(*inputs, **keywords)
            self.done += 1
            now = time.monotonic()
            if self.done == self.total or now - self.told > EVERY:
                self.told = now
                seconds = f"{now - self.started:.0f} s"
                say(f"compiled {self.done} of {self.total} blocks (forward) in {seconds}")
            return result

        return call


def compile_blocks(blocks: list[nn.Module], zero_stage: int = 0) -> None:
    """Replace the blocks' forward methods by compiled ones; each is compiled at its first call.

    The method is replaced, not the module, so that parameter names do not change. Under ZeRO-3 each
    block becomes a leaf module, whose parameters are gathered together before it runs: hooks inside
    it would cause graph breaks.
    """
    progress = CompileProgress(len(blocks))
    for block in blocks:
        compiled = torch.compile(block.forward, dynamic=True, options={"fallback_random": True})
        block.forward = progress.counting(compiled)  # type: ignore[method-assign]
        if zero_stage == 3:
            from deepspeed.utils import set_z3_leaf_module

            set_z3_leaf_module(block, True)
            _give_gradient(block)


def _give_gradient(block: nn.Module) -> None:
    """Let an input of a trained block require a gradient, also where the layers below are frozen.

    Without one a checkpoint gives the block's parameters none, and DeepSpeed does not know when the
    backward pass of a leaf module ends.
    """
    if any(parameter.requires_grad for parameter in block.parameters()):
        block.register_forward_pre_hook(_with_a_gradient, with_kwargs=True)


def _with_a_gradient(block: nn.Module, *inputs: object) -> object:
    """The arguments and keyword arguments of a call, of which a tensor requires a gradient."""
    leaves, structure = tree_flatten(inputs)
    floats = list(filter(_is_float, leaves))
    if torch.is_grad_enabled() and not any(x.requires_grad for x in floats):
        place = next(i for i, leaf in enumerate(leaves) if leaf is floats[0])
        leaves[place] = floats[0].detach().requires_grad_()
    return tree_unflatten(leaves, structure)


def whole(block: nn.Module) -> AbstractContextManager[object]:
    """A context in which a leaf module of ZeRO-3 has its parameters. Collective.

    For calls of its other methods than forward, which no hook precedes.
    """
    if not getattr(block, "_z3_leaf", False):  # DeepSpeed's mark
        return nullcontext()
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

    divided = ZeroParamStatus.NOT_AVAILABLE
    parameters: Iterable[Any] = block.parameters()
    return GatheredParameters([p for p in parameters if p.ds_status == divided])  # collective
