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

BASE, IN, OUT = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"  # peft's names


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
    """Let the input need a gradient, also where the layers below are frozen.

    Without one DeepSpeed does not know when the backward pass of a leaf module ends.
    """
    x, *others = inputs
    if torch.is_grad_enabled() and not x.requires_grad:
        trained = any(parameter.requires_grad for parameter in block.parameters())
        x = x.detach().requires_grad_(trained)
    return x, *others


def read_outside(encoder: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Modules, each with a parameter that it reads although another one holds it.

    ZeRO-3 gathers a module's own when it is called, and others by itself in training alone.
    """
    model = getattr(encoder, "model", None)
    for called in (model, getattr(model, "trunk", None)):  # by other methods than forward
        if called is not None:
            yield from ((encoder, parameter) for parameter in called.parameters(recurse=False))
    for module in encoder.modules():
        parts: list[nn.Module] = []
        if isinstance(module, nn.MultiheadAttention):
            parts = [module.out_proj]
        elif isinstance(table := getattr(module, "position_embedding", None), nn.Embedding):
            parts = [table]  # CLIP's and its like read its size
        for part in parts:
            yield from ((module, parameter) for parameter in part.parameters())


def cast_buffers(image: nn.Module, dtype: torch.dtype) -> None:
    """Cast the floating-point buffers of a module, left in fp32 by DeepSpeed (0.19.8).

    timm's models expect their masks, position biases and BatchNorm's statistics in the dtype of
    their weights. Rotary embeddings stay in fp32, because angles need its precision.
    """
    for part in image.modules():
        if not type(part).__name__.startswith("Rotary"):
            for name, buffer in part.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    setattr(part, name, buffer.to(dtype))


def add_adapters(student: Student, config: StudentConfig) -> None:
    """Freeze the encoders of `config.lora` and put adapters into the layers that it names, which
    add alpha / R times B(A(x)), with A [R, I] and B [O, R], which is zero at first."""
    if not config.lora:
        return
    with blame("student.lora: pip install 'ds-cmli[lora]'"):
        from peft import LoraConfig, inject_adapter_in_model

    for part, names in config.lora.items():
        encoder = getattr(student, part)
        kinds = {layer: type(module) for layer, module in encoder.named_modules()}
        for name in names:  # peft takes any layer, and is silent where others of the names fit
            named = [layer for layer in kinds if f".{layer}".endswith(f".{name}")]
            setting, linear = f"student.lora.{part} has {name!r}", nn.Linear
            if not named:
                known = {layer.rpartition(".")[2] for layer in kinds if kinds[layer] is linear}
                why = f"which no layer's name ends with: {nearest(name, known)}"
                raise UserError(f"{setting}, {why}")
            for layer in named:
                if kinds[layer] is not linear:
                    why = f"{layer} is no nn.Linear but {kinds[layer].__name__}"
                    raise UserError(f"{setting}: {why}: name linear layers")
        rank, alpha = config.lora_rank, config.lora_alpha
        adapters = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(names))
        inject_adapter_in_model(adapters, encoder)
    student.lora_scale = config.lora_alpha / config.lora_rank


def merged(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The adapters in their layers' weights, W + scale B A under W's name; `scale`: alpha / R."""
    out = {}
    for name, weight in weights.items():
        if name.endswith((IN, OUT)):
            continue
        layer = name.removesuffix(f"{BASE}weight")
        if layer != name:
            weight = weight + scale * (weights[layer + OUT] @ weights[layer + IN])
        out[name.replace(BASE, ".")] = weight
    return out
