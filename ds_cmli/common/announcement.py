"""Tells transformers of exported models, without importing it and without what they need.

transformers has no other way to learn of a package's models than calls of its auto classes. They are made when the
modules of these classes are imported, with classes that import `ds_cmli.export` when the first model is loaded.
"""

import sys
from collections.abc import Callable
from typing import Any


class CMLIConfig:
    """Stands for `export.CMLIConfig`."""

    model_type = "ds_cmli"

    @staticmethod
    def from_dict(*args: Any, **kwargs: Any) -> Any:
        from ds_cmli import export  # which registers the classes themselves

        return export.CMLIConfig.from_dict(*args, **kwargs)


class CMLIProcessor:
    """Stands for `export.CMLIProcessor`; transformers finds it by its name."""

    @staticmethod
    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        from ds_cmli import export

        return export.CMLIProcessor.from_pretrained(*args, **kwargs)


REGISTER: dict[str, Callable[[Any], None]] = {
    "transformers.models.auto.configuration_auto": lambda module: module.AutoConfig.register(
        CMLIConfig.model_type, CMLIConfig
    ),
    "transformers.models.auto.processing_auto": lambda module: module.AutoProcessor.register(CMLIConfig, CMLIProcessor),
}


class Finder:
    """Of `sys.meta_path`: has the modules of the table found as usual, and registers with each once it is there."""

    def __init__(self, names: set[str]):
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self.names:
            return None
        self.names.remove(name)  # so that the search below passes this finder over
        from importlib.util import find_spec

        spec: Any = find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            REGISTER[name](module)

        spec.loader.exec_module = execute_and_register
        return spec


def make() -> None:
    """Announce the models, now or when transformers is imported."""
    there = REGISTER.keys() & sys.modules.keys()
    for name in there:
        REGISTER[name](sys.modules[name])
    sys.meta_path.insert(0, Finder(set(REGISTER) - there))  # type: ignore[arg-type]
