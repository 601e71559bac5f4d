"""A mistake in an option, setting or file: exit code 2, one line on stderr that names it, nothing written.

A row of a room's `mistakes.py` is a command line, in which {here} is a folder, what the line must name, and perhaps a
function that prepares the folder.
"""

import importlib
import os
import shlex
import sys
from pathlib import Path
from unittest import mock

import pytest

from tests import ranks

ROOMS = ("config", "data", "models", "checkpoint", "memory", "evaluate", "export")
MODULES = {
    "train": "ds_cmli.train",
    "evaluate": "ds_cmli.evaluate.__main__",
    "export": "ds_cmli.export.__main__",
    "memory": "ds_cmli.memory.command",
    "visualize": "ds_cmli.visualize",
}
ROWS = []
for room in ROOMS:
    for number, row in enumerate(importlib.import_module(f"tests.{room}.mistakes").MISTAKES):
        ROWS.append(pytest.param(*(*row, None)[:3], id=f"{room}-{number}"))


def argv(line: str, here: Path) -> tuple[str, list[str]]:
    """The command, and its arguments, to which those of a small training are added."""
    command, *words = shlex.split(line)
    words = [word.format(here=here) for word in words]
    if command in ("train", "memory") and "--preset" not in words:
        words = ["--preset", "tiny", *words]
    if command == "train" and "--output-dir" not in words:
        words += ["--output-dir", str(here / "run")]
    return command, words


def files(here: Path) -> dict[str, bytes]:
    """Those with content: the metrics of a run may have been opened."""
    return {str(path): path.read_bytes() for path in here.rglob("*") if path.is_file() and path.stat().st_size}


def assert_one_line(code: int, errors: str, named: str) -> None:
    told = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(told) == 1 and named in told[0] and "Traceback" not in errors, errors


@pytest.mark.parametrize("line, named, prepare", ROWS)
def test_a_mistake_is_one_line(line, named, prepare, tmp_path, capfd):
    from ds_cmli.common.cli import exit_code

    if prepare is not None:
        prepare(tmp_path)
    name, words = argv(line, tmp_path)
    before = files(tmp_path)
    capfd.readouterr()
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "0"}
    with mock.patch.object(sys, "argv", [name, *words]), mock.patch.dict(os.environ, one):
        code = exit_code(importlib.import_module(MODULES[name]).command)
    assert_one_line(code, capfd.readouterr().err, named)
    assert files(tmp_path) == before


@pytest.mark.parametrize("line, named", [("train --preset dmeo", "--preset"), ("evaluate --checkpoint /none", "/none")])
def test_a_process_of_its_own_ends_so_too(line, named, tmp_path):
    name, words = argv(line, tmp_path)
    (done,) = ranks.commands(["-m", MODULES[name].removesuffix(".__main__"), *words], 1)
    assert_one_line(done.returncode, done.stderr, named)
