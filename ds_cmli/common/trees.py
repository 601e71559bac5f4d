"""The tensors inside of lists, tuples, dicts and dataclasses."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def tree_map(value: object, function: Callable, kind: type = Tensor) -> Any:
    """`value` with each instance of `kind` in it replaced by `function` of it."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(tree_map(item, function, kind) for item in value)
    if isinstance(value, dict):
        return {key: tree_map(item, function, kind) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        values = {item.name: getattr(value, item.name) for item in fields(value)}
        return type(value)(**tree_map(values, function, kind))
    return value


def tensors(value: object) -> list[Tensor]:
    """All tensors in it."""
    out: list[Tensor] = []
    tree_map(value, out.append)
    return out
