"""A mistake in an option, setting or file: exit code 2, one line on stderr that names it, nothing written.

A row of `mistakes.py` is a command line, in which {folder} is a folder, what the line must name, and perhaps a function
that prepares the folder.
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

from ds_cmli import train
from ds_cmli.commands import exit_code
from tests import make, ranks
from tests.mistakes import MISTAKES

MODULES = {
    "train": "ds_cmli.train",
    "evaluate": "ds_cmli.evaluate.__main__",
    "export": "ds_cmli.export",
    "memory": "ds_cmli.memory.command",
    "visualize": "ds_cmli.visualize",
    "estimates": "profiling.compare_estimates",
}
ROWS = [pytest.param(*(*row, None)[:3], id=f"{row[0][:60]} {row[1][:40]}") for row in MISTAKES]


def argv(line: str, folder: Path) -> tuple[str, list[str]]:
    """Return the command and its arguments, with those of a small training added."""
    command, *words = shlex.split(line)
    words = [word.format(folder=folder) for word in words]
    if command in ("train", "memory") and "--preset" not in words:
        words = ["--preset", "tiny", *words]
    if command == "train" and "--output-dir" not in words:
        words += ["--output-dir", str(folder / "run")]
    return command, words


def assert_one_line(code: int, errors: str, named: str) -> None:
    printed = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2, f"exit code {code}, not 2: {errors}"
    assert len(printed) == 1, f"{len(printed)} lines of errors, not one: {errors}"
    assert named in printed[0], f"the line does not name {named!r}: {errors}"
    assert len(printed[0]) < 2000, f"a line of {len(printed[0])} characters: {errors}"
    assert "Traceback" not in errors, errors


@pytest.mark.parametrize("line, named, prepare", ROWS)
def test_a_mistake_is_one_line(line, named, prepare, tmp_path, capfd):
    if prepare is not None:
        prepare(tmp_path)
    name, words = argv(line, tmp_path)
    contents_before = make.contents(tmp_path)
    capfd.readouterr()
    with mock.patch.object(sys, "argv", [name, *words]), mock.patch.dict(os.environ, ranks.ALONE):
        code = exit_code(importlib.import_module(MODULES[name]).command)
    assert_one_line(code, capfd.readouterr().err, named)
    assert make.contents(tmp_path) == contents_before, "a refused start has written or changed a file"


@pytest.mark.parametrize("command", ["train", "memory"])
def test_a_mistake_is_printed_before_slow_libraries_are_imported(command, tmp_path):
    name, words = argv(f"{command} --deepspeed_config /nowhere", tmp_path)
    module = "profiling.predict" if name == "memory" else MODULES[name]
    done = ranks.python("-X", "importtime", "-m", module, *words, env=ranks.environments(1)[0])
    assert_one_line(done.returncode, done.stderr, "/nowhere")
    assert " click" in done.stderr and not re.search(r"\b(deepspeed|timm)\n", done.stderr)


def train_in_own_folder(rank: int, world: int, words: list[str], folders: list[str]) -> tuple[int, str]:
    """Return the exit code and stderr of a rank's training that starts in its folder."""
    os.chdir(folders[rank])
    words = [word.replace("{rank}", str(rank)) for word in words]
    with mock.patch.object(sys, "argv", ["train", *words]), redirect_stderr(io.StringIO()) as errors:
        return exit_code(train.command), errors.getvalue()


@pytest.mark.parametrize(
    "options, named",
    [("--data {folder}/pairs-{{rank}}", "rank 1: "), ("--data {folder}/pairs-0 --output-dir run", "--output-dir")],
)
def test_a_mistake_of_one_rank_ends_all_ranks(options, named, tmp_path):
    make.pairs(tmp_path / "pairs-0")
    folders = [str(tmp_path / f"node-{rank}") for rank in range(2)]
    for folder in folders:
        os.mkdir(folder)
    words = argv(f"train {options}", tmp_path)[1]
    first_rank, second_rank = ranks.run(train_in_own_folder, 2, words, folders, group=False)
    code, errors = first_rank
    second_code, second_errors = second_rank
    assert_one_line(code, errors, named)
    assert second_code == 2
    assert "Traceback" not in second_errors, second_errors
