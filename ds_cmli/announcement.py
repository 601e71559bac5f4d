"""Registers the exported models with transformers, without importing what they need.

transformers learns of a package's models only through calls to its auto classes. `make` has these
calls made as soon as the modules of the auto classes are imported. The classes registered here are
placeholders: they import `ds_cmli.export` when the first model is loaded.
"""

import sys
from collections.abc import Callable
from typing import Any


class CMLIConfig:
    """A placeholder for `export.CMLIConfig`."""

    model_type = "ds_cmli"

    @staticmethod
    def from_dict(*args: Any, **kwargs: Any) -> Any:
        from ds_cmli import export  # the import registers the real classes

        return export.CMLIConfig.from_dict(*args, **kwargs)


class CMLIProcessor:
    """A placeholder for `export.CMLIProcessor`; transformers finds the real class by its name."""

    @staticmethod
    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        from ds_cmli import export

        return export.CMLIProcessor.from_pretrained(*args, **kwargs)


REGISTER: dict[str, Callable[[Any], None]] = {
    "transformers.models.auto.configuration_auto": lambda module: module.AutoConfig.register(
        CMLIConfig.model_type, CMLIConfig
    ),
    "transformers.models.auto.processing_auto": lambda module: module.AutoProcessor.register(
        CMLIConfig, CMLIProcessor
    ),
}


class Finder:
    """An import hook that calls the functions of `REGISTER` once their modules are imported."""

    def __init__(self, names: set[str]):
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self.names:
            return None
        self.names.remove(name)  # so that the search below does not call this finder again
        from importlib.util import find_spec

        spec: Any = find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            REGISTER[name](module)

        spec.loader.exec_module = execute_and_register
        return spec


def make() -> None:
    """Register the models now if transformers is already imported, or else when it is imported."""
    there = REGISTER.keys() & sys.modules.keys()
    for name in there:
        REGISTER[name](sys.modules[name])
    sys.meta_path.insert(0, Finder(set(REGISTER) - there))  # type: ignore[arg-type]
