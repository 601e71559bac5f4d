"""A mistake in an option, setting or file: exit code 2, one line on stderr that names it, nothing written.

A row of a room's `mistakes.py` is a command line, in which {here} is a folder, what the line must name, and perhaps a
function that prepares the folder.
"""

import importlib
import io
import os
import re
import shlex
import sys
from contextlib import redirect_stderr
from pathlib import Path
from unittest import mock

import pytest

from tests import make, ranks

ROOMS = ("config", "data", "models", "checkpoint", "memory", "evaluate", "profiling")
MODULES = {
    "train": "ds_cmli.train",
    "evaluate": "ds_cmli.evaluate.__main__",
    "export": "ds_cmli.export",
    "memory": "ds_cmli.memory.command",
    "visualize": "ds_cmli.visualize",
    "estimates": "profiling.compare_estimates",
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


def files(here: Path) -> dict[Path, bytes | None]:
    """The files with their content, and the folders."""
    return {path: path.read_bytes() if path.is_file() else None for path in here.rglob("*")}


def assert_one_line(code: int, errors: str, named: str) -> None:
    told = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(told) == 1 and named in told[0] and "Traceback" not in errors, errors
    assert len(told[0]) < 2000, errors


@pytest.mark.parametrize("line, named, prepare", ROWS)
def test_a_mistake_is_one_line(line, named, prepare, tmp_path, capfd):
    from ds_cmli.commands import exit_code

    if prepare is not None:
        prepare(tmp_path)
    name, words = argv(line, tmp_path)
    before = files(tmp_path)
    capfd.readouterr()
    with mock.patch.object(sys, "argv", [name, *words]), mock.patch.dict(os.environ, ranks.ALONE):
        code = exit_code(importlib.import_module(MODULES[name]).command)
    assert_one_line(code, capfd.readouterr().err, named)
    assert files(tmp_path) == before


@pytest.mark.parametrize("command", ["train", "memory"])
def test_it_is_told_before_libraries_are_imported_that_take_seconds(command, tmp_path):
    name, words = argv(f"{command} --deepspeed_config /nowhere", tmp_path)
    module = "profiling.predict" if name == "memory" else MODULES[name]
    done = ranks.python("-X", "importtime", "-m", module, *words, env=ranks.environments(1)[0])
    assert_one_line(done.returncode, done.stderr, "/nowhere")
    assert " click" in done.stderr and not re.search(r"\b(deepspeed|timm)\n", done.stderr)


def of_rank(rank: int, world: int, words: list[str], folders: list[str]) -> tuple[int, str]:
    """The exit code and stderr of a rank's training, begun in its folder."""
    from ds_cmli.commands import exit_code
    from ds_cmli.train import command

    os.chdir(folders[rank])
    words = [word.replace("{rank}", str(rank)) for word in words]
    with mock.patch.object(sys, "argv", ["train", *words]), redirect_stderr(io.StringIO()) as errors:
        return exit_code(command), errors.getvalue()


@pytest.mark.parametrize(
    "options, named",
    [("--data {here}/pairs-{{rank}}", "rank 1: "), ("--data {here}/pairs-0 --output-dir run", "--output-dir")],
)
def test_a_mistake_that_one_rank_alone_has_is_told_by_all(options, named, tmp_path):
    make.pairs(tmp_path / "pairs-0")
    folders = [str(tmp_path / f"node-{rank}") for rank in range(2)]
    for folder in folders:
        os.mkdir(folder)
    words = argv(f"train {options}", tmp_path)[1]
    (code, errors), second = ranks.run(of_rank, 2, words, folders, group=False)
    assert_one_line(code, errors, named)
    assert second[0] == 2 and "Traceback" not in second[1]
