"""The optimizer's parameter groups: what is trained, what decays, and the learning rates."""

from collections import Counter
from typing import Any, NamedTuple

from torch import nn

from ds_cmli.config.schema import OptimConfig, StudentConfig
from ds_cmli.errors import UserError

ENCODERS = ("image", "text")  # the parts that have layers, by the student's names for them
# Parts of the names of parameters that do not count as matrices, whatever their shape: tables of
# position embeddings and of position biases, class and other tokens.
NO_MATRIX = ("bias", "pos", "token")


class Place(NamedTuple):
    """The place of a parameter in the objective.

    Layer k of an encoder, counted from 1, has depth k; depth 0 is below the first layer
    (embeddings), and layers + 1 above the last. What an encoder registers between two layers has
    the depth of the layer before it.
    """

    # "image", "text", or "rest": shared blocks, heads, the projection and the losses' parameters.
    part: str = "rest"
    depth: int = 1
    layers: int = 0  # of the part


def places(objective: nn.Module) -> dict[str, Place]:
    """Return the place of each parameter, by its name."""
    student: Any = objective.student
    out = {name: Place() for name, _ in objective.named_parameters()}
    for part in ENCODERS:
        encoder = getattr(student, part)
        layers = len(encoder.blocks)
        depth = 0
        of_layer: dict[nn.Parameter, int] = {}
        for k, block in enumerate(encoder.blocks, 1):
            of_layer |= dict.fromkeys(block.parameters(), k)
        left = set(of_layer)
        for name, parameter in encoder.named_parameters():
            if parameter in of_layer:
                depth = of_layer[parameter]
                left.discard(parameter)
            elif layers and not left:
                depth = layers + 1
            out[f"student.{part}.{name}"] = Place(part, depth, layers)
    return out


def freeze(objective: nn.Module, student: StudentConfig) -> None:
    """Freeze the encoders' first layers, and the embeddings below them, as the settings say.

    Raises:
        UserError: an encoder has fewer layers, or adapters in frozen ones alone.
    """
    first = {"image": student.freeze_image, "text": student.freeze_text}
    where = places(objective)
    for name, parameter in objective.named_parameters():
        part, depth, layers = where[name]
        count = first.get(part, 0)
        if count > layers and part in ENCODERS:
            raise UserError(
                f"student.freeze_{part} is {count}: the {part} encoder has {layers} layers"
            )
        if count == layers > 0 and part in student.lora:
            raise UserError(
                f"student.freeze_{part} is {count}, all layers of the {part} encoder, and "
                f"student.lora names some: no adapter would be trained: give {count - 1} or less"
            )
        # If all layers are frozen, so is what is above them: the whole encoder.
        if count and (depth <= count or count == layers):
            parameter.requires_grad_(False)


def parameter_groups(
    objective: nn.Module, weight_decay: float, optim: OptimConfig, lr: float
) -> list[dict[str, Any]]:
    """Group the trained parameters for the optimizer, the highest learning rate first.

    Weight decay is for matrices only: norms, biases, temperatures, tokens, embeddings and position
    tables get none. There is a learning rate for each factor of `optim`, which multiplies `lr`.
    """
    spared: set[nn.Parameter] = set()
    for module in objective.modules():
        if isinstance(module, nn.Embedding):
            spared.update(module.parameters())
        of_timm: Any = getattr(module, "no_weight_decay", None)
        names = of_timm() if callable(of_timm) else ()
        spared.update(p for name, p in module.named_parameters() if name in names)
    factors = {str(part): factor for part, factor in optim.lr_factors.items()}
    where = places(objective)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        part, depth, layers = where[name]
        # Layers above it in its encoder; the heads count as one.
        above = layers + 1 - depth if part in ENCODERS else 0
        factor = factors.get(part, 1.0) * optim.layer_decay**above
        matrix = sum(size > 1 for size in parameter.shape) >= 2 and parameter not in spared
        table = any(word in name.rsplit(".", 1)[-1] for word in NO_MATRIX)
        groups.setdefault((factor, matrix and not table), []).append(parameter)
    one_rate = all(factor == 1.0 for factor, _ in groups)
    out: list[dict[str, Any]] = []
    for (factor, decays), parameters in sorted(groups.items(), key=lambda g: g[0], reverse=True):
        group = {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        out.append(group if one_rate else {**group, "lr": factor * lr})
    return out


def counts_line(objective: nn.Module, teacher: nn.Module | None) -> str:
    """Return the log's line of the numbers of parameters and of trained ones, by part."""
    total = Counter[str]()
    trained = Counter[str]()
    where = places(objective)
    for name, parameter in objective.named_parameters():
        # The whole size, also under ZeRO-3.
        size = getattr(parameter, "ds_numel", parameter.numel())
        for part in ("all", where[name].part):
            total[part] += size
            trained[part] += size * parameter.requires_grad
    shares = []
    for part in [*total][1:]:
        note = f" ({trained[part] / 1e6:.2f}M trained)" if trained[part] < total[part] else ""
        shares.append(f"{part} {total[part] / 1e6:.2f}M{note}")
    frozen = ""
    if teacher is not None:
        frozen = f"; teacher {sum(p.numel() for p in teacher.parameters()) / 1e6:.2f}M"
    counts = f"{total['all'] / 1e6:.2f}M, {trained['all'] / 1e6:.2f}M trained"
    return f"parameters: {counts}: {', '.join(shares)}{frozen}"
