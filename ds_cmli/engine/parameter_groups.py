"""The optimizer's parameter groups: which parameters are trained, which decay, and how fast each part learns."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import Config, OptimConfig

ENCODERS = ("image", "text")  # the parts with layers, as the student names them
# In the names of parameters that are no matrices whatever their shape: tables of positions and their biases, tokens.
NO_MATRIX = ("bias", "pos", "token")
# Schedulers that set the rate of every group to a number of their own, and so undo what makes groups differ.
ONE_RATE = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "CyclicLR", "OneCycleLR")


def part_of(name: str) -> str:
    """ "image", "text" or "rest": shared blocks, heads, projection and the losses' parameters."""
    return next((part for part in ENCODERS if name.startswith(f"student.{part}.")), "rest")


def depths(module: nn.Module) -> dict[str, tuple[str, int, int]]:
    """name of a parameter -> (part, depth, layers of the part).

    Depth k is that of layer k, counted from 1; 0 lies below the first layer (embeddings), and layers + 1 above the
    last. What an encoder registers between two layers counts to the one before.
    """
    student: Any = module.student
    out = dict.fromkeys((name for name, _ in module.named_parameters()), ("rest", 1, 0))
    for part in ENCODERS:
        encoder = getattr(student, part)
        layer = {id(p): k for k, block in enumerate(encoder.blocks, 1) for p in block.parameters()}
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
    """Take the first layers of the encoders, with the embeddings below them, out of training, as `student` says.

    Raises:
        UserError: an encoder has fewer layers.
    """
    first = {"image": config.student.freeze_image, "text": config.student.freeze_text}
    where = depths(module)
    for name, parameter in module.named_parameters():
        part, depth, layers = where[name]
        count = first.get(part, 0)
        if count > layers and part in ENCODERS:
            raise UserError(f"student.freeze_{part} is {count}: the {part} encoder has {layers} layers")
        # All of its layers: the whole encoder, with what lies above them.
        if count and (depth <= count or count == layers):
            parameter.requires_grad_(False)


def factor(where: tuple[str, int, int], optim: OptimConfig) -> float:
    """What the learning rate of a parameter at that place is multiplied by."""
    part, depth, layers = where
    above = layers + 1 - depth if part in ENCODERS else 0  # layers above it, in its encoder, with the heads as one
    factors: dict[str, float] = {str(name): value for name, value in optim.lr_factors.items()}
    return factors.get(part, 1.0) * optim.layer_decay**above


def parameter_groups(
    module: nn.Module, weight_decay: float, optim: OptimConfig | None = None, lr: float = 1.0
) -> list[dict[str, Any]]:
    """The trained parameters: weight decay on matrices only, and a learning rate for each factor of `optim`.

    Norms, biases, temperatures, tokens, embeddings and tables of positions do not decay.

    Args:
        lr: that the factors multiply.
    """
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    spared: set[int] = set()
    for owner in module.modules():
        named: Any = getattr(owner, "no_weight_decay", None)  # timm's models name theirs
        names = named() if callable(named) else ()
        spared |= {id(parameter) for name, parameter in owner.named_parameters() if name in names}
    where = depths(module) if optim is not None else {}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        vector = sum(size > 1 for size in parameter.shape) < 2
        table = id(parameter) in embeddings or any(word in name.rsplit(".", 1)[-1] for word in NO_MATRIX)
        flat = vector or table or id(parameter) in spared
        rate = factor(where[name], optim) if optim is not None else 1.0
        groups.setdefault((-rate, float(flat)), []).append(parameter)
    out: list[dict[str, Any]] = []
    for (rate, plain), parameters in sorted(groups.items(), key=lambda item: item[0]):
        group = {"params": parameters, "weight_decay": 0.0 if plain else weight_decay}
        out.append(group if len({r for r, _ in groups}) == 1 and rate == -1.0 else {**group, "lr": -rate * lr})
    return out


def check_rates(optim: OptimConfig, ds_config: Mapping[str, Any]) -> None:
    """Raise `UserError` where the JSON's scheduler would undo the rates of `optim`."""
    kind = DeepSpeedConfig.of(ds_config).get("scheduler", {}).get("type")
    asked = "layer_decay" if optim.layer_decay != 1 else "lr_factors" if optim.lr_factors else None
    if asked is not None and kind in ONE_RATE:
        raise UserError(
            f"optim.{asked} is {getattr(optim, asked)!r} and scheduler.type is {kind!r}, which sets one rate for all "
            "parameters: leave out the scheduler, or take WarmupCosineLR"
        )


def counts_line(module: nn.Module, teacher: nn.Module | None) -> str:
    """How many parameters there are and are trained, by part; for the log."""
    total: dict[str, list[int]] = {}
    for name, parameter in module.named_parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 holds a part
        both = total.setdefault(part_of(name), [0, 0])
        both[0] += size
        both[1] += size * parameter.requires_grad
    parts = ", ".join(
        f"{part} {all_ / 1e6:.2f}M" + (f" ({trained / 1e6:.2f}M trained)" if trained < all_ else "")
        for part, (all_, trained) in total.items()
    )
    every, trained = (sum(both[i] for both in total.values()) for i in (0, 1))
    frozen = f"; teacher {sum(p.numel() for p in teacher.parameters()) / 1e6:.2f}M" if teacher is not None else ""
    return f"parameters: {every / 1e6:.2f}M, {trained / 1e6:.2f}M trained: {parts}{frozen}"
