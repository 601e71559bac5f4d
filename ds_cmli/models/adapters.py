"""Adapters (LoRA, Hu et al., 2022, by peft) in the encoders of a student."""

from collections.abc import Mapping

from torch import Tensor, nn

from ds_cmli.config.schema import StudentConfig
from ds_cmli.errors import UserError, blame, nearest
from ds_cmli.models.student import Student

# Parts of names that peft gives to a layer that it adapts, and to the two matrices of an adapter.
BASE_LAYER = ".base_layer."
LORA_A = ".lora_A.default.weight"
LORA_B = ".lora_B.default.weight"


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
