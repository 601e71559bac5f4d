"""Training of image-text models with all-pairs CMLI under DeepSpeed ZeRO."""

import importlib


def __getattr__(name: str) -> object:
    if name in ("evaluate", "inference"):  # only now, as they import torch
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
