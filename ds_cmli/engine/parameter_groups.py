"""The optimizer's parameter groups: what is trained, what decays, and the learning rates."""

from collections import Counter
from typing import Any, NamedTuple

from torch import nn

from ds_cmli.config.schema import OptimConfig, StudentConfig
from ds_cmli.errors import UserError

ENCODERS = ("image", "text")  # the parts that have layers, by the student's names for them
# Words in the names of parameters that get no weight decay, whatever their shape.
NO_DECAY_WORDS = ("bias", "pos", "token")


class Place(NamedTuple):
    """The place of a parameter in the objective.

    Layer k of an encoder, counted from 1, has depth k; depth 0 is below the first layer
    (embeddings), and layers + 1 above the last. A parameter between two layers has the depth of
    the lower one.
    """

    # "image", "text", or "rest": shared blocks, heads, the projection and the losses' parameters.
    part: str = "rest"
    depth: int = 1
    layers: int = 0  # of the part


def places(objective: nn.Module) -> dict[str, Place]:
    """Return the place of each parameter, by its name."""
    student: Any = objective.student
    place_of = {name: Place() for name, _ in objective.named_parameters()}
    for part in ENCODERS:
        encoder = getattr(student, part)
        layers = len(encoder.blocks)
        depth = 0
        layer_of: dict[nn.Parameter, int] = {}
        for k, block in enumerate(encoder.blocks, 1):
            layer_of |= dict.fromkeys(block.parameters(), k)
        unvisited = set(layer_of)
        for name, parameter in encoder.named_parameters():
            if parameter in layer_of:
                depth = layer_of[parameter]
                unvisited.discard(parameter)
            elif layers and not unvisited:
                depth = layers + 1
            place_of[f"student.{part}.{name}"] = Place(part, depth, layers)
    return place_of


def freeze(objective: nn.Module, student: StudentConfig) -> None:
    """Freeze the encoders' first layers, and the embeddings below them, as the settings say.

    Raises `UserError` if an encoder has fewer layers, or adapters in frozen ones alone.
    """
    num_frozen_of = {"image": student.freeze_image, "text": student.freeze_text}
    place_of = places(objective)
    for name, parameter in objective.named_parameters():
        part, depth, layers = place_of[name]
        num_frozen = num_frozen_of.get(part, 0)
        if num_frozen > layers and part in ENCODERS:
            raise UserError(
                f"student.freeze_{part} is {num_frozen}: the {part} encoder has {layers} layers"
            )
        if num_frozen == layers > 0 and part in student.lora:
            raise UserError(
                f"student.freeze_{part} is {num_frozen}, all layers of the {part} encoder, and "
                "student.lora names some: no adapter would be trained: "
                f"give {num_frozen - 1} or less"
            )
        # If all layers are frozen, so is what is above them: the whole encoder.
        if num_frozen and (depth <= num_frozen or num_frozen == layers):
            parameter.requires_grad_(False)


def group_parameters(
    objective: nn.Module, weight_decay: float, optim: OptimConfig, lr: float
) -> list[dict[str, Any]]:
    """Group the trained parameters for the optimizer, the highest learning rate first.

    Weight decay is for matrices only: norms, biases, temperatures, tokens, embeddings and position
    tables get none. There is a learning rate for each factor of `optim`, which multiplies `lr`.
    """
    without_decay: set[nn.Parameter] = set()
    for module in objective.modules():
        if isinstance(module, nn.Embedding):
            without_decay.update(module.parameters())
        timm_names: Any = getattr(module, "no_weight_decay", None)
        names = timm_names() if callable(timm_names) else ()
        without_decay.update(p for name, p in module.named_parameters() if name in names)
    factors = {str(part): factor for part, factor in optim.lr_factors.items()}
    place_of = places(objective)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        part, depth, layers = place_of[name]
        # In its encoder; the heads count as one.
        layers_above = layers + 1 - depth if part in ENCODERS else 0
        factor = factors.get(part, 1.0) * optim.layer_decay**layers_above
        is_matrix = parameter.squeeze().ndim >= 2 and parameter not in without_decay
        is_table = any(word in name.rsplit(".", 1)[-1] for word in NO_DECAY_WORDS)
        groups.setdefault((factor, is_matrix and not is_table), []).append(parameter)
    has_one_rate = all(factor == 1.0 for factor, _ in groups)
    out: list[dict[str, Any]] = []
    for (factor, decays), parameters in sorted(groups.items(), key=lambda g: g[0], reverse=True):
        group = {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        out.append(group if has_one_rate else {**group, "lr": factor * lr})
    return out


def counts_line(objective: nn.Module, teacher: nn.Module | None) -> str:
    """Return the log's line of the numbers of parameters and of trained ones, by part."""
    total = Counter[str]()
    trained = Counter[str]()
    place_of = places(objective)
    for name, parameter in objective.named_parameters():
        # The whole size, also under ZeRO-3.
        size = getattr(parameter, "ds_numel", parameter.numel())
        total[place_of[name].part] += size
        trained[place_of[name].part] += size * parameter.requires_grad
    shares = []
    for part in total:
        note = f" ({trained[part] / 1e6:.2f}M trained)" if trained[part] < total[part] else ""
        shares.append(f"{part} {total[part] / 1e6:.2f}M{note}")
    frozen = ""
    if teacher is not None:
        frozen = f"; teacher {sum(p.numel() for p in teacher.parameters()) / 1e6:.2f}M"
    counts = f"{total.total() / 1e6:.2f}M, {trained.total() / 1e6:.2f}M trained"
    return f"parameters: {counts}: {', '.join(shares)}{frozen}"
