"""How the layers of a model run: recomputed, compiled, with adapters; what ZeRO-3 has to know.

A block's forward method is replaced and not the module, so that parameter names do not change.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_cmli.config.schema import StudentConfig
from ds_cmli.errors import UserError, blame, nearest
from ds_cmli.models.student import Student

# Parts of names that peft gives to a layer that it adapts, and to the two matrices of an adapter.
BASE_LAYER = ".base_layer."
LORA_A = ".lora_A.default.weight"
LORA_B = ".lora_B.default.weight"


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
            block.register_forward_pre_hook(_with_a_gradient)


def _with_a_gradient(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Let the input need a gradient, also if the layers below are frozen.

    Without one DeepSpeed does not know when the backward pass of a leaf module ends.
    """
    x, *rest = inputs
    if torch.is_grad_enabled() and not x.requires_grad:
        trained = any(parameter.requires_grad for parameter in block.parameters())
        x = x.detach().requires_grad_(trained)
    return x, *rest


def read_outside(encoder: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Yield modules, each with a parameter that it reads although another module holds it.

    ZeRO-3 gathers a module's own parameters when it is called, and in training alone others too.
    """
    model = getattr(encoder, "model", None)
    for called in (model, getattr(model, "trunk", None)):  # by other methods than forward
        if called is not None:
            yield from ((encoder, parameter) for parameter in called.parameters(recurse=False))
    for module in encoder.modules():
        if isinstance(module, nn.MultiheadAttention):
            yield from ((module, parameter) for parameter in module.out_proj.parameters())
        elif isinstance(table := getattr(module, "position_embedding", None), nn.Embedding):
            yield module, table.weight  # CLIP's and its like read its size


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


def add_adapters(student: Student, config: StudentConfig) -> None:
    """Freeze the encoders of `config.lora`, and put adapters into the layers that it names.

    An adapter adds alpha / R * B(A(x)), with A [R, I] and B [O, R], which is zero at first. Raises
    `UserError`.
    """
    if not config.lora:
        return
    with blame("student.lora: pip install 'ds-cmli[lora]'"):
        from peft import LoraConfig, inject_adapter_in_model

    for part, names in config.lora.items():
        encoder = getattr(student, part)
        for name in names:
            check_layers(encoder, name, f"student.lora.{part} has {name!r}")
        adapters = LoraConfig(
            r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=list(names)
        )
        inject_adapter_in_model(adapters, encoder)
    student.lora_scale = config.lora_alpha / config.lora_rank


def check_layers(encoder: nn.Module, name: str, setting: str) -> None:
    """Raise `UserError` unless `name` ends the names of some layers, all of them linear.

    peft takes layers of any type, and is silent about a name if others fit.
    """
    types = {layer: type(module) for layer, module in encoder.named_modules()}
    layers = [layer for layer in types if f".{layer}".endswith(f".{name}")]
    if not layers:
        linear = {layer.rpartition(".")[2] for layer in types if types[layer] is nn.Linear}
        raise UserError(f"{setting}, which no layer's name ends with: {nearest(name, linear)}")
    for layer in layers:
        if types[layer] is not nn.Linear:
            reason = f"{layer} is no nn.Linear but {types[layer].__name__}"
            raise UserError(f"{setting}: {reason}: name linear layers")


def merge_adapters(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return the weights with W + scale * B A under the name of W; `scale`: alpha / R."""
    merged = {}
    for name, weight in weights.items():
        if name.endswith((LORA_A, LORA_B)):
            continue
        layer = name.removesuffix(f"{BASE_LAYER}weight")
        if layer != name:
            weight = weight + scale * (weights[layer + LORA_B] @ weights[layer + LORA_A])
        merged[name.replace(BASE_LAYER, ".")] = weight
    return merged
