"""The optimizer's parameter groups: which parameters are trained, which get weight decay, and their learning rates."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import Config, OptimConfig

ENCODERS = ("image", "text")  # the parts that have layers, by the student's names for them
# Parts of the names of parameters that do not count as matrices, whatever their shape: tables of position embeddings
# and of position biases, class and other tokens.
NO_MATRIX = ("bias", "pos", "token")
# Schedulers that set the learning rate of every group to their own numbers, and so undo the groups' different rates.
ONE_RATE = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "CyclicLR", "OneCycleLR")


def part_of(name: str) -> str:
    """ "image", "text" or, for shared blocks, heads, projection and the losses' parameters, "rest"."""
    return next((part for part in ENCODERS if name.startswith(f"student.{part}.")), "rest")


def depths(module: nn.Module) -> dict[str, tuple[str, int, int]]:
    """name of a parameter -> (part, depth, number of layers of the part).

    Layer k, counted from 1, has depth k; depth 0 is below the first layer (embeddings), and layers + 1 above the last.
    What an encoder registers between two layers has the depth of the layer before it.
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
    """Freeze the encoders' first layers and the embeddings below them, as `student.freeze_image` and `freeze_text` say.

    Raises:
        UserError: an encoder has fewer layers.
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
        # Where all layers are frozen, so is what is above them: the whole encoder.
        if count and (depth <= count or count == layers):
            parameter.requires_grad_(False)


def factor(where: tuple[str, int, int], optim: OptimConfig) -> float:
    """The factor of the learning rate of a parameter at that place, an entry of `depths`."""
    part, depth, layers = where
    above = (
        layers + 1 - depth if part in ENCODERS else 0
    )  # layers above it in its encoder; the heads count as one
    factors: dict[str, float] = {str(name): value for name, value in optim.lr_factors.items()}
    return factors.get(part, 1.0) * optim.layer_decay**above


def parameter_groups(
    module: nn.Module, weight_decay: float, optim: OptimConfig | None = None, lr: float = 1.0
) -> list[dict[str, Any]]:
    """Groups of the trained parameters: weight decay on matrices only, and a learning rate for each factor of `optim`.

    Norms, biases, temperatures, tokens, embeddings and position tables get no weight decay.

    Args:
        lr: the learning rate that the factors multiply.
    """
    embeddings = {
        id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    spared: set[int] = set()
    for owner in module.modules():
        named: Any = getattr(owner, "no_weight_decay", None)  # timm's models name such parameters
        names = named() if callable(named) else ()
        spared |= {id(parameter) for name, parameter in owner.named_parameters() if name in names}
    where = depths(module) if optim is not None else {}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        vector = sum(size > 1 for size in parameter.shape) < 2
        table = id(parameter) in embeddings or any(
            word in name.rsplit(".", 1)[-1] for word in NO_MATRIX
        )
        flat = vector or table or id(parameter) in spared
        rate = factor(where[name], optim) if optim is not None else 1.0
        groups.setdefault((-rate, float(flat)), []).append(parameter)
    out: list[dict[str, Any]] = []
    for (rate, plain), parameters in sorted(groups.items(), key=lambda item: item[0]):
        group = {"params": parameters, "weight_decay": 0.0 if plain else weight_decay}
        out.append(
            group
            if len({r for r, _ in groups}) == 1 and rate == -1.0
            else {**group, "lr": -rate * lr}
        )
    return out


def rates_without_effect(module: nn.Module, optim: OptimConfig) -> Iterator[str]:
    """A line for each learning rate factor of `optim` that is of frozen parameters alone."""
    trained = {
        part_of(name) for name, parameter in module.named_parameters() if parameter.requires_grad
    }
    for part in sorted(set(optim.lr_factors) - trained):
        yield f"optim.lr_factors {part} has no effect: the whole {part} encoder is frozen (student.freeze_{part})"
    if optim.layer_decay != 1 and not trained & set(ENCODERS):
        yield "optim.layer_decay has no effect: both encoders are frozen whole"


def check_rates(optim: OptimConfig, ds_config: Mapping[str, Any]) -> None:
    """Raise `UserError` if the JSON's scheduler would undo the different learning rates of `optim`."""
    kind = DeepSpeedConfig.of(ds_config).get("scheduler", {}).get("type")
    asked = "layer_decay" if optim.layer_decay != 1 else "lr_factors" if optim.lr_factors else None
    if asked is not None and kind in ONE_RATE:
        raise UserError(
            f"optim.{asked} is {getattr(optim, asked)!r} and scheduler.type is {kind!r}, which sets one rate for all "
            "parameters: leave out the scheduler, or take WarmupCosineLR"
        )


def counts_line(module: nn.Module, teacher: nn.Module | None) -> str:
    """A line for the log: how many parameters there are, and how many of them are trained, by part."""
    total: dict[str, list[int]] = {}
    for name, parameter in module.named_parameters():
        size = getattr(
            parameter, "ds_numel", parameter.numel()
        )  # the whole size, also under ZeRO-3
        both = total.setdefault(part_of(name), [0, 0])
        both[0] += size
        both[1] += size * parameter.requires_grad
    parts = ", ".join(
        f"{part} {all_ / 1e6:.2f}M" + (f" ({trained / 1e6:.2f}M trained)" if trained < all_ else "")
        for part, (all_, trained) in total.items()
    )
    every, trained = (sum(both[i] for both in total.values()) for i in (0, 1))
    frozen = (
        f"; teacher {sum(p.numel() for p in teacher.parameters()) / 1e6:.2f}M"
        if teacher is not None
        else ""
    )
    return f"parameters: {every / 1e6:.2f}M, {trained / 1e6:.2f}M trained: {parts}{frozen}"
