"""Training of image-text models with all-pairs CMLI under DeepSpeed ZeRO."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ds_cmli.fitting import fit

__all__ = ["evaluate", "fit", "inference"]


def __getattr__(name: str) -> object:
    if name == "fit":  # only now, as these import torch
        from ds_cmli.fitting import fit

        return fit
    if name in ("evaluate", "inference"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
