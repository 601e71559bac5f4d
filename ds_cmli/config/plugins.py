"""Modules of the user's that add entries to the tables of `registry.py` when they are imported.

A plugin is imported where the user names it, by `--plugin`, DS_CMLI_PLUGINS or `load`, and where an
installed package has an entry point of the group "ds_cmli.plugins". A run's folder names those that
it was trained with, and that alone never imports one: folders come from strangers too.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from ds_cmli.common import checksums
from ds_cmli.common.cli import option
from ds_cmli.common.errors import UserError, one_line
from ds_cmli.config import registry
from ds_cmli.config.validation import check, check_kind, shown

GROUP, VARIABLE = "ds_cmli.plugins", "DS_CMLI_PLUGINS"
TABLES: dict[str, tuple[dict, type]] = {
    "LOSSES": (registry.LOSSES, registry.LossEntry),
    "IMAGE": (registry.IMAGE, registry.BackboneEntry),
    "TEXT": (registry.TEXT, registry.BackboneEntry),
    "SOURCES": (registry.SOURCES, registry.SourceEntry),
    "TASKS": (registry.TASKS, registry.TaskEntry),
}
# The names that each plugin has added, of those that the user named and those of entry points.
_given: dict[str, list[str]] = {}
_installed: dict[str, list[str]] = {}


class NotImported(UserError):
    """A run needs a plugin that nobody but its own folder names."""


def load(name: str, setting: str = "plugin") -> None:
    """Import a plugin by the name of its module; processes that this one starts import it too.

    Raises:
        UserError: there is no such module, its import fails, or it changes entries of others. The
            line names `setting`, and no entry of it stays.
    """
    if name not in _given:
        added = _import(name, f"{setting} is {shown(name)}")
        _given[name] = _installed.pop(name, added)
        os.environ[VARIABLE] = ",".join(_given)


@cache
def load_installed() -> None:
    """Import what DS_CMLI_PLUGINS and the entry points of installed packages name.

    Raises `UserError` as `load` does.
    """
    for name in os.environ.get(VARIABLE, "").replace(",", " ").split():
        load(name, VARIABLE)
    for entry in entry_points(group=GROUP):
        if entry.value not in _given.keys() | _installed.keys():
            place = f"the entry point {entry.name!r} of {entry.dist and entry.dist.name}"
            _installed[entry.value] = _import(entry.value, f"{place} is {entry.value!r}")


def _import(name: str, place: str) -> list[str]:
    """Import a module, and return the names that it has added to the tables."""
    if not all(map(str.isidentifier, name.split("."))):
        raise UserError(f"{place}: give a module as in `import my_package`, not a file")
    before = {table: dict(entries) for table, (entries, _) in TABLES.items()}
    try:
        importlib.import_module(name)
        return _added(before, place)
    except (Exception, SystemExit) as error:
        for table, (entries, _) in TABLES.items():
            entries.clear()
            entries.update(before[table])
        sys.modules.pop(name, None)  # a second try would otherwise import nothing
        if isinstance(error, UserError):
            raise
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            why = "no such module: install its package, or add its folder to PYTHONPATH"
            raise UserError(f"{place}: {why}") from None
        line = traceback.extract_tb(error.__traceback__)[-1]
        why = f"{type(error).__name__}: {one_line(error)} ({line.filename}, line {line.lineno})"
        raise UserError(f"{place}: its import fails, repair it: {why}") from None


def _added(before: Mapping[str, Mapping[str, object]], place: str) -> list[str]:
    """The new names; raises `UserError` for other changes."""
    added = []
    for table, (entries, kind) in TABLES.items():
        for name in entries.keys() | before[table].keys():
            old, new = before[table].get(name), entries.get(name)
            if new is not old:
                check(old is None, f"{place}: its {table}", name, "the name is taken: give another")
                entry = f"{place}: its {table}[{name!r}]"
                check(isinstance(new, kind), entry, new, f"give a registry.{kind.__name__}")
                added.append(name)
    return sorted(added)


def of_run(names: set[str]) -> list[str]:
    """The plugins for a run's `config.json`: those named by the user, and those with these names.

    Args:
        names: of the run's losses and backbones.
    """
    load_installed()
    return [*_given, *filter(lambda name: names & {*_installed[name]}, _installed)]


def require(names: object, place: str) -> None:
    """Raise `NotImported` if one of a run's plugins, as its folder names them, is not imported.

    Raises `ValueError` if `names` is no list of names.
    """
    check_kind("plugins", names, list[str])
    load_installed()
    for name in names:  # type: ignore[attr-defined]
        if name not in sys.modules:
            raise NotImported(
                f"{place}: it was made with the plugin {shown(name)}, which is code that a folder "
                f"alone does not import: give --plugin {name}, set {VARIABLE}, or import it first"
            )


def require_those_of(folder: str) -> None:
    """Raise `NotImported` for a plugin of the earlier run in `--output-dir`, if there is one.

    `folder` may be "", of no run.
    """
    if not folder:
        return
    with suppress(OSError, ValueError):
        content = checksums.read(Path(folder) / "config.json")
        require(content.get("plugins", []), f"--output-dir is {folder!r}")


def line() -> str | None:
    """A line of the imported plugins and what each has added; None if there are none."""
    load_installed()
    parts = []
    for name, added in {**_given, **_installed}.items():
        parts.append(f"{name} ({', '.join(added) or 'no names'})")
    return f"plugins: {', '.join(parts)}" if parts else None


def _load_all(context: object, parameter: object, names: Sequence[str]) -> None:
    for name in names:
        load(name, "--plugin")


plugin_option = option(
    "Plugins",
    "--plugin",
    metavar="MODULE",
    multiple=True,
    is_eager=True,  # before options whose values a plugin may add
    expose_value=False,
    callback=_load_all,
    help="Import a module that registers losses, backbones, sources or tasks "
    "(docs/plugins.md). Repeatable.",
)
