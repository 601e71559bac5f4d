"""Encoders, student and teacher; `config/registry.py` lists the backbones."""

from typing import Any

from ds_cmli.config.registry import AUTO, IMAGE, TEXT, BackboneEntry, load

__all__ = ["IMAGE", "TEXT", "build"]


def build(table: dict[str, BackboneEntry], name: str, request: Any) -> Any:
    """Build the backbone `name` for a `backbone.ImageRequest` or `TextRequest`.

    "auto" selects the first backbone of the table that accepts the model, or else the last one, which reports why the
    model cannot be used.

    Raises:
        UserError: the model is unknown, its weights do not fit, or it cannot be used.
    """
    if name == AUTO:
        name = next(
            (known for known in table if load(table[known]).takes(request)), list(table)[-1]
        )
    return load(table[name])(request)
