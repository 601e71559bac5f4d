"""The optimizer's parameter groups: what is trained, what decays, and the learning rates."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import Config, OptimConfig

# DeepSpeed's schedules that set one rate for all parameters.
ONE_RATE = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR")
ENCODERS = ("image", "text")  # the parts that have layers, by the student's names for them
# Parts of the names of parameters that do not count as matrices, whatever their shape: tables of
# position embeddings and of position biases, class and other tokens.
NO_MATRIX = ("bias", "pos", "token")


def part_of(name: str) -> str:
    """The part of the student that a parameter belongs to: "image", "text" or "rest".

    The rest are shared blocks, heads, the projection and the losses' parameters.
    """
    return next((part for part in ENCODERS if name.startswith(f"student.{part}.")), "rest")


def depths(module: nn.Module) -> dict[str, tuple[str, int, int]]:
    """name of a parameter -> (part, depth, number of layers of the part).

    Layer k, counted from 1, has depth k; depth 0 is below the first layer (embeddings), and
    layers + 1 above the last. What an encoder registers between two layers has the depth of the
    layer before it.
    """
    student: Any = module.student
    out = dict.fromkeys((name for name, _ in module.named_parameters()), ("rest", 1, 0))
    for part in ENCODERS:
        encoder = getattr(student, part)
        layer: dict[int, int] = {}
        for k, block in enumerate(encoder.blocks, 1):
            layer |= {id(parameter): k for parameter in block.parameters()}
        layers, depth = len(encoder.blocks), 0
        seen: set[int] = set()
        for name, parameter in encoder.named_parameters():
            if len(seen) == len(layer) and id(parameter) not in layer and layers:
                depth = layers + 1
            elif id(parameter) in layer:
                seen.add(id(parameter))
                depth = layer[id(parameter)]
            out[f"student.{part}.{name}"] = part, depth, layers
    return out


def freeze(module: nn.Module, config: Config) -> None:
    """Freeze the encoders' first layers and the embeddings below them.

    `student.freeze_image` and `freeze_text` say how many.

    Raises:
        UserError: an encoder has fewer layers, or adapters in frozen ones alone.
    """
    first = {"image": config.student.freeze_image, "text": config.student.freeze_text}
    where = depths(module)
    for name, parameter in module.named_parameters():
        part, depth, layers = where[name]
        count = first.get(part, 0)
        if count > layers and part in ENCODERS:
            raise UserError(
                f"student.freeze_{part} is {count}: the {part} encoder has {layers} layers"
            )
        if count == layers > 0 and part in config.student.lora:
            raise UserError(
                f"student.freeze_{part} is {count}, all layers of the {part} encoder, and "
                f"student.lora names some: no adapter would be trained: give {count - 1} or less"
            )
        # Where all layers are frozen, so is what is above them: the whole encoder.
        if count and (depth <= count or count == layers):
            parameter.requires_grad_(False)


def factor(where: tuple[str, int, int], optim: OptimConfig) -> float:
    """The factor of the learning rate of a parameter at that place, an entry of `depths`."""
    part, depth, layers = where
    # Layers above it in its encoder; the heads count as one.
    above = layers + 1 - depth if part in ENCODERS else 0
    factors: dict[str, float] = {str(name): value for name, value in optim.lr_factors.items()}
    return factors.get(part, 1.0) * optim.layer_decay**above


class ParameterGroup(NamedTuple):
    rate: float  # the factor of its learning rate
    decays: bool  # whether its parameters get weight decay


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    optim: OptimConfig | None = None,
    lr: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups of the trained parameters for the optimizer, the highest learning rate first.

    Weight decay is for matrices only: norms, biases, temperatures, tokens, embeddings and position
    tables get none. There is a learning rate for each factor of `optim`.

    Args:
        lr: the learning rate that the factors multiply.
    """
    spared = _spared(module)
    where = depths(module) if optim is not None else {}
    groups: dict[ParameterGroup, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        vector = sum(size > 1 for size in parameter.shape) < 2
        last = name.rsplit(".", 1)[-1]
        table = any(word in last for word in NO_MATRIX)
        rate = factor(where[name], optim) if optim is not None else 1.0
        decays = not (vector or table or id(parameter) in spared)
        groups.setdefault(ParameterGroup(rate, decays), []).append(parameter)
    one_rate = all(group.rate == 1.0 for group in groups)
    out: list[dict[str, Any]] = []
    for group in sorted(groups, key=lambda group: (-group.rate, not group.decays)):
        options: dict[str, Any] = {"params": groups[group]}
        options["weight_decay"] = weight_decay if group.decays else 0.0
        if not one_rate:
            options["lr"] = group.rate * lr
        out.append(options)
    return out


def _spared(module: nn.Module) -> set[int]:
    """The ids of embeddings, and of parameters that timm's models name as without weight decay."""
    ids: set[int] = set()
    for owner in module.modules():
        if isinstance(owner, nn.Embedding):
            ids |= set(map(id, owner.parameters()))
        named: Any = getattr(owner, "no_weight_decay", None)
        names = named() if callable(named) else ()
        ids |= {id(parameter) for name, parameter in owner.named_parameters() if name in names}
    return ids


def check_rates(optim: OptimConfig, ds_config: Mapping[str, Any]) -> None:
    """Raise `UserError` if the JSON's scheduler would undo the learning rates of `optim`."""
    json = DeepSpeedConfig.of(ds_config)
    kind = json.get("scheduler", {}).get("type")
    rates: dict[str, object] = {}
    if optim.layer_decay != 1:
        rates["optim.layer_decay"] = optim.layer_decay
    if optim.lr_factors:
        rates["optim.lr_factors"] = optim.lr_factors
    if rates and kind in ONE_RATE:
        name = min(rates)
        raise UserError(
            f"{name} is {rates[name]!r} and scheduler.type is {kind!r}, which "
            "sets one rate for all parameters: leave out the scheduler, or take WarmupCosineLR"
        )


def counts_line(module: nn.Module, teacher: nn.Module | None) -> str:
    """A line for the log: how many parameters there are and how many are trained, by part."""
    total: dict[str, int] = {}
    trained: dict[str, int] = {}
    for name, parameter in module.named_parameters():
        part = part_of(name)
        # The whole size, also under ZeRO-3.
        size = getattr(parameter, "ds_numel", parameter.numel())
        total[part] = total.get(part, 0) + size
        trained[part] = trained.get(part, 0) + size * parameter.requires_grad
    parts = []
    for part, size in total.items():
        line = f"{part} {size / 1e6:.2f}M"
        if trained[part] < size:
            line += f" ({trained[part] / 1e6:.2f}M trained)"
        parts.append(line)
    frozen = ""
    if teacher is not None:
        frozen = f"; teacher {sum(p.numel() for p in teacher.parameters()) / 1e6:.2f}M"
    every, of_them = sum(total.values()) / 1e6, sum(trained.values()) / 1e6
    return f"parameters: {every:.2f}M, {of_them:.2f}M trained: {', '.join(parts)}{frozen}"
