"""The optimizer's parameter groups: which parameters decay."""

from typing import Any

from torch import nn

# In the names of parameters that are no matrices whatever their shape: tables of positions and their biases, tokens.
NO_MATRIX = ("bias", "pos", "token")


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only: not on norms, biases, temperatures, tokens, embeddings and tables of positions."""
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    spared: set[int] = set()
    for owner in module.modules():
        named: Any = getattr(owner, "no_weight_decay", None)  # timm's models name theirs
        names = named() if callable(named) else ()
        spared |= {id(parameter) for name, parameter in owner.named_parameters() if name in names}
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        vector = sum(size > 1 for size in parameter.shape) < 2
        table = id(parameter) in embeddings or any(part in name.rsplit(".", 1)[-1] for part in NO_MATRIX)
        (plain if vector or table or id(parameter) in spared else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
