"""The registry of backbones. A new backbone is one file in this folder and one line in a table below.

That line is all that `--image-backbone`, `--text-backbone`, `teacher.backbone`, the check of their names, the help text
and the memory prediction need. The tables are read without importing PyTorch: an entry only names its class, and `load`
imports it.
"""

from dataclasses import dataclass
from typing import Any

from ds_cmli.common import registry

AUTO = "auto"  # selects the first entry of the table whose `takes` accepts the model


@dataclass(frozen=True)
class Entry:
    implementation: str  # "file.Class", a `backbone.ImageBackbone` or `backbone.TextBackbone`
    models: str  # the models that it supports, for the help text


IMAGE = {
    "timm_tokens": Entry("timm_tokens.TimmTokens", "timm's ViT, DeiT, BEiT, EVA, SigLIP"),
    "timm_grid": Entry(
        "timm_grid.TimmGrid", "timm's Swin, ConvNeXt, ResNet and others with a feature map"
    ),
}
TEXT = {
    "encoder": Entry(
        "transformers_encoder.Encoder", "transformers' BERT, RoBERTa, DeBERTa, ModernBERT, T5"
    ),
    "causal": Entry(
        "transformers_causal.Causal", "transformers' CLIP, GPT-2: pooled at the end token"
    ),
}


def load(table: dict[str, Entry], name: str) -> Any:
    """Import the file of the backbone `name` and return its class."""
    return registry.load(__name__, table[name].implementation)


def build(table: dict[str, Entry], name: str, request: Any) -> Any:
    """Build the backbone `name` for a `backbone.ImageRequest` or `TextRequest`.

    "auto" selects the first backbone of the table that accepts the model, or else the last one, which reports why the
    model cannot be used.

    Raises:
        UserError: the model is unknown, its weights do not fit, or it cannot be used.
    """
    if name == AUTO:
        name = next(
            (known for known in table if load(table, known).takes(request)), list(table)[-1]
        )
    return load(table, name)(request)


def described(table: dict[str, Entry]) -> str:
    """Describe the table in one line, for help texts."""
    return "; ".join(
        [f"{AUTO}: by the model", *(f"{name}: {entry.models}" for name, entry in table.items())]
    )
