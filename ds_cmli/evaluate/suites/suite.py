"""A suite of tasks: a TOML file with a table for each, `[NAME]` with its `kind` and settings."""

from functools import partial
from pathlib import Path
from typing import get_args, get_type_hints

from ds_cmli.common.errors import UserError, check_regular, one_line
from ds_cmli.common.json_text import parse_toml
from ds_cmli.config.registry import TASKS, load
from ds_cmli.config.validation import build, check, choice
from ds_cmli.evaluate.suites.task import Task


def read_suite(file: str) -> dict[str, Task]:
    """The tasks of a suite by name, with their lists read.

    Raises:
        UserError: the file is no TOML, or has no task, an unknown kind or key, or a missing file.
    """
    path = Path(file).expanduser()
    setting = f"--suite is {file!r}"
    check_regular("--suite", path)
    try:
        content = parse_toml(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{setting}: cannot read it: {error.strerror}") from None
    except ValueError as error:  # TOML's own, and that of bytes that are no UTF-8
        raise UserError(f"{setting}, which is no TOML: {one_line(error)}") from None
    if not content:
        raise UserError(f"{setting}, which has no task: add a table [NAME] with its kind")
    tasks = {}
    for name, table in content.items():
        tasks[name] = _task(name, table, path.parent.absolute())
        try:
            tasks[name].read()
        except UserError as error:
            raise UserError(f"--suite: {name}: {error}") from None
    return tasks


def _task(name: str, table: object, folder: Path) -> Task:
    """Build one task. Raises `UserError`."""
    need = f"give a table [{name}] with its kind, one of {', '.join(TASKS)}"
    check(isinstance(table, dict) and "kind" in table, f"--suite: {name}", table, need)
    assert isinstance(table, dict)
    choice(f"--suite: {name}.kind", table["kind"], list(TASKS))
    task: type = load(TASKS[table["kind"]])
    hints = get_type_hints(task)
    settings = dict(table)
    del settings["kind"]
    for key in settings:
        setting = f"--suite: {name}.{key}"
        choice(f"setting of --suite: {name}", key, list(hints))
        if Path in (hints[key], *get_args(hints[key])):
            settings[key] = _existing(setting, settings[key], folder)
    return build(task, f"--suite: {name}", settings, {})


def _existing(setting: str, value: object, folder: Path) -> Path | list[Path]:
    """The paths of a setting, relative to the suite. Raises `UserError` if one is not there."""
    if isinstance(value, list):
        return list(map(partial(_one, setting, folder), value))
    return _one(setting, folder, value)


def _one(setting: str, folder: Path, value: object) -> Path:
    check(isinstance(value, str), setting, value, "give a path as a text")
    assert isinstance(value, str)
    path = folder / Path(value).expanduser()
    there = value and "\0" not in value and path.exists()
    check(bool(there), setting, value, f"no such file or folder, from {str(folder)!r}")
    return path
