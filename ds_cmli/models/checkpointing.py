"""Activation checkpointing of an encoder's blocks, for any arguments and outputs of their forward methods."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten


def checkpoint_blocks(blocks: list[nn.Module], checkpoint: Callable) -> None:
    """Wrap each block's forward in `checkpoint(function, *tensors)`, so that only its inputs are kept for backward.

    The forward method is replaced, not the module, so that parameter names do not change.
    """
    for block in blocks:
        trained = any(parameter.requires_grad for parameter in block.parameters())
        block.forward = _checkpointed(block.forward, checkpoint, trained)  # type: ignore[method-assign]


def _checkpointed(forward: Callable, checkpoint: Callable, trained: bool) -> Callable:
    """Return `forward` under `checkpoint`; `trained` says whether any of the block's parameters is trained."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        leaves, inputs_as = tree_flatten((args, kwargs))
        # Only floating-point tensors can need a gradient, so they are passed to the checkpoint, keyword arguments too
        # (for instance a relative position bias). Masks and flags reach the block through the closure.
        places = [
            i
            for i, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        inputs = [leaves[i] for i in places]
        if not any(x.requires_grad for x in inputs):
            if not trained:
                return forward(*args, **kwargs)
            # The layers below are frozen. Without an input that requires a gradient, the block's parameters get none.
            inputs = [x.detach().requires_grad_() for x in inputs]
        for i in places:
            leaves[i] = (
                None  # only the checkpoint holds the tensors, so it alone decides when they are freed
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
