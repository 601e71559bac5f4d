"""Encoders, student and teacher; `config/registry.py` lists the backbones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ds_cmli.config.registry import AUTO, IMAGE, TEXT, BackboneEntry, load

if TYPE_CHECKING:
    from ds_cmli.models.backbone import ImageRequest, TextRequest

__all__ = ["IMAGE", "TEXT", "build"]


def build(table: dict[str, BackboneEntry], name: str, request: ImageRequest | TextRequest) -> Any:
    """Build the backbone `name`.

    "auto" selects the first backbone of the table that accepts the model, or else the last one,
    which reports why the model cannot be used.

    Raises:
        UserError: the model is unknown, its weights do not fit, or it cannot be used.
    """
    if name != AUTO:
        return load(table[name])(request)
    for entry in table.values():
        backbone = load(entry)
        if backbone.takes(request):
            break
    return backbone(request)
