"""Activation checkpointing of an encoder's blocks, whatever their arguments and outputs are."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten


def checkpoint_blocks(blocks: list[nn.Module], checkpoint: Callable) -> None:
    """Make each block keep only its inputs for backward, through `checkpoint(function, *tensors)`.

    The forward method is replaced and not the module, so that parameter names stay as they are.
    """
    for block in blocks:
        trained = any(parameter.requires_grad for parameter in block.parameters())
        block.forward = _checkpointed(block.forward, checkpoint, trained)  # type: ignore[method-assign]


def _checkpointed(forward: Callable, checkpoint: Callable, trained: bool) -> Callable:
    """`trained`: whether some of the block's parameters are."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        leaves, inputs_as = tree_flatten((args, kwargs))
        # Only floating-point tensors can need a gradient, and so must be known to the checkpoint, by whichever keyword
        # they come (a bias of relative positions, for instance); masks and flags pass by closure.
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        inputs = [leaves[i] for i in places]
        if not any(x.requires_grad for x in inputs):
            if not trained:
                return forward(*args, **kwargs)
            # Above frozen layers: without an input that asks for a gradient the block's parameters would get none.
            inputs = [x.detach().requires_grad_() for x in inputs]
        for i in places:
            leaves[i] = None  # the checkpoint alone decides how long they are held
        outputs_as: list[Any] = []

        def call(*tensors: Tensor) -> Any:
            filled = list(leaves)
            for i, tensor in zip(places, tensors, strict=True):
                filled[i] = tensor
            again, by_name = tree_unflatten(filled, inputs_as)
            found, structure = tree_flatten(forward(*again, **by_name))
            # (whether it is a tensor, what it is otherwise) of each output
            others = [(isinstance(leaf, Tensor), None if isinstance(leaf, Tensor) else leaf) for leaf in found]
            outputs_as[:] = [structure, others]
            kept = [leaf for leaf in found if isinstance(leaf, Tensor)]
            return kept[0] if len(kept) == 1 else tuple(kept)

        given = checkpoint(call, *inputs)
        structure, others = outputs_as
        tensors = iter((given,) if isinstance(given, Tensor) else given)
        # A checkpoint gives tensors alone; what else the block gave is put between them again.
        return tree_unflatten([next(tensors) if is_tensor else leaf for is_tensor, leaf in others], structure)

    return run
