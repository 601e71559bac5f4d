"""LoRA (Hu et al., 2022) by peft: adapters of low rank in linear layers of a frozen encoder.

Shapes: I inputs and O outputs of a layer, R rank.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from ds_cmli.common import UserError, nearest
from ds_cmli.config.schema import StudentConfig
from ds_cmli.models.student import Student

BASE, IN, OUT = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"  # peft's names


def add_adapters(student: Student, config: StudentConfig) -> None:
    """Freeze the encoders of `config.lora` and put adapters into the layers that it names, which
    add alpha / R times B(A(x)), with A [R, I] and B [O, R], which is zero at first."""
    if not config.lora:
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        why = "peft is not installed: pip install 'ds-cmli[lora]'"
        raise UserError(f"student.lora is given, and {why}") from None

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
