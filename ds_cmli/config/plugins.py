"""`--plugin MODULE` imports a module, which adds entries to the tables of `registry.py`."""

import importlib
from collections.abc import Sequence

from ds_cmli.common.cli import option
from ds_cmli.common.errors import UserError, one_line

imported: list[str] = []  # by `load`; a process that predicts memory imports them too


def load(name: str) -> None:
    """Import a plugin by the name of its module. Raises `UserError` for an ImportError."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--plugin is {name!r}: {one_line(error)}") from error
    imported.append(name)


def _load_all(context: object, parameter: object, names: Sequence[str]) -> None:
    for name in names:
        load(name)


plugin_option = option(
    "Plugins",
    "--plugin",
    metavar="MODULE",
    multiple=True,
    is_eager=True,  # before options whose values a plugin may add
    expose_value=False,
    callback=_load_all,
    help="Import a module that registers losses, backbones or sources (docs/plugins.md). "
    "Repeatable.",
)
