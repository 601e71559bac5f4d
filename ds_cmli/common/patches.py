"""Attributes of libraries and variables that are replaced for a while."""

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

PATCHES = {
    "transformers: mask": ("transformers.masking_utils", "is_tracing"),
    "deepspeed: recovery script": (
        "deepspeed.runtime.engine:DeepSpeedEngine",
        "_copy_recovery_script",
    ),
}
replaced = mock.patch.object


def _owner(name: str) -> Any:
    module, _, attribute = PATCHES[name][0].partition(":")
    owner = importlib.import_module(module)
    return getattr(owner, attribute) if attribute else owner


@contextmanager
def patched(name: str, replacement: Callable[[Any], object]) -> Iterator[None]:
    owner, attribute = _owner(name), PATCHES[name][1]
    with mock.patch.object(owner, attribute, replacement(getattr(owner, attribute))):
        yield


def patch_for_good(name: str, value: object) -> None:
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = value


@contextmanager
def environment(values: Mapping[str, str], *others: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, values):
        yield
