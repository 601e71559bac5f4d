"""The optimizer's parameter groups: which parameters decay."""

from typing import Any

from torch import nn


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only: not on norms, biases, temperatures, class tokens and embeddings."""
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    named = ("cls_token", "pos_embed", "reg_token", "mask_token")
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        flat = parameter.ndim < 2 or id(parameter) in embeddings or name.rsplit(".", 1)[-1] in named
        (plain if flat else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
