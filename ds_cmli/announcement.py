"""Registers the exported models with transformers, without importing what they need.

transformers learns of a package's models only through calls to its auto classes. `make` has these
calls made as soon as the modules of the auto classes are imported. The classes registered here are
placeholders: they import `ds_cmli.export` when the first model is loaded.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


class CMLIConfig:
    """A placeholder for `export.CMLIConfig`."""

    model_type = "ds_cmli"

    @staticmethod
    def from_dict(*args: object, **kwargs: object) -> object:
        from ds_cmli import export  # the import registers the real classes

        return export.CMLIConfig.from_dict(*args, **kwargs)  # type: ignore[arg-type]


class CMLIProcessor:
    """A placeholder for `export.CMLIProcessor`; transformers finds the real class by its name."""

    @staticmethod
    def from_pretrained(*args: object, **kwargs: object) -> object:
        from ds_cmli import export

        return export.CMLIProcessor.from_pretrained(*args, **kwargs)  # type: ignore[arg-type]


REGISTER: dict[str, Callable[[ModuleType], None]] = {
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

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.names:
            return None
        self.names.remove(name)  # so that the search below does not call this finder again
        spec = find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            REGISTER[name](module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def make() -> None:
    """Register the models now if transformers is already imported, or else when it is imported."""
    there = REGISTER.keys() & sys.modules.keys()
    for name in there:
        REGISTER[name](sys.modules[name])
    sys.meta_path.insert(0, Finder(set(REGISTER) - there))
