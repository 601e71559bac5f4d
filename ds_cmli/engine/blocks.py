"""Recompute, compile and prepare the layers of a model for the engine.

A block's forward method is replaced and not the module, so that parameter names do not change.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(blocks: list[nn.Module]) -> None:
    """Recompute each block in backward.

    torch's own, not DeepSpeed's: `deepspeed.checkpointing.non_reentrant_checkpoint` (0.19.8) fails
    under ZeRO-3, and its `checkpoint` gives no gradient where no input needs one.
    """
    for block in blocks:
        forward = partial(checkpoint, block.forward, use_reentrant=False)
        block.forward = forward  # type: ignore[method-assign]


def compile_blocks(blocks: list[nn.Module], zero_stage: int = 0) -> None:
    """Compile each block at its first call; the code between blocks is not compiled.

    Sizes are dynamic from the start, so that the code does not depend on which batches came first,
    and dropout draws what it draws without the compiler. Under ZeRO-3 a block becomes a leaf
    module, whose parameters are gathered together: hooks inside it would cause graph breaks.
    """
    for block in blocks:
        compiled = torch.compile(block.forward, dynamic=True, options={"fallback_random": True})
        block.forward = compiled  # type: ignore[method-assign]
        if zero_stage == 3:
            from deepspeed.utils import set_z3_leaf_module

            set_z3_leaf_module(block, True)
            block.register_forward_pre_hook(_require_input_gradient)


def _require_input_gradient(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Let the input need a gradient, also if the layers below are frozen.

    Without one DeepSpeed does not know when the backward pass of a leaf module ends.
    """
    x, *other_inputs = inputs
    if torch.is_grad_enabled() and not x.requires_grad:
        trained = any(parameter.requires_grad for parameter in block.parameters())
        x = x.detach().requires_grad_(trained)
    return x, *other_inputs


def external_parameters(encoder: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Yield modules, each with a parameter that it reads although another module holds it.

    When a module is called, ZeRO-3 gathers its own parameters. It finds others by itself in
    training only.
    """
    model = getattr(encoder, "model", None)
    for called in (model, getattr(model, "trunk", None)):  # by other methods than forward
        if called is not None:
            yield from ((encoder, parameter) for parameter in called.parameters(recurse=False))
    for module in encoder.modules():
        if isinstance(module, nn.MultiheadAttention):
            yield from ((module, parameter) for parameter in module.out_proj.parameters())
        elif isinstance(table := getattr(module, "position_embedding", None), nn.Embedding):
            # CLIP and its like read the table's size.
            yield from ((module, parameter) for parameter in table.parameters())


def cast_buffers(image: nn.Module, dtype: torch.dtype) -> None:
    """Cast the floating-point buffers of a module, which DeepSpeed (0.19.8) leaves in fp32.

    timm's models expect their masks, position biases and BatchNorm's statistics in the dtype of
    their weights. Rotary embeddings stay in fp32, because angles need its precision.
    """
    for part in image.modules():
        if not type(part).__name__.startswith("Rotary"):
            for name, buffer in part.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    setattr(part, name, buffer.to(dtype))
