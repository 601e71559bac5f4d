"""Imports what an entry of a registry names: the registries of losses, backbones, sources and trackers."""

from importlib import import_module
from typing import Any


def load(package: str, implementation: str) -> Any:
    """Import a file of `package` and return a class or function from it; `implementation` is "file.Name"."""
    module, _, name = implementation.partition(".")
    return getattr(import_module(f"{package}.{module}"), name)
