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


def files(here: Path) -> dict[str, bytes]:
    """Those with content: the metrics of a run may have been opened."""
    return {str(path): path.read_bytes() for path in here.rglob("*") if path.is_file() and path.stat().st_size}


def assert_one_line(code: int, errors: str, named: str) -> None:
    told = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(told) == 1 and named in told[0] and "Traceback" not in errors, errors
    assert len(told[0]) < 2000, errors


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


@pytest.mark.parametrize(
    "line, named",
    [
        ("train --deepspeed_config /nowhere.json", "/nowhere.json"),
        ("evaluate --checkpoint /nowhere", "/nowhere"),
        ("memory --deepspeed_config /nowhere.json", "/nowhere.json"),
    ],
)
def test_it_is_told_before_libraries_are_imported_that_take_seconds(line, named, tmp_path):
    name, words = argv(line, tmp_path)
    module = "profiling.predict" if name == "memory" else MODULES[name].removesuffix(".__main__")
    (done,) = ranks.commands(["-X", "importtime", "-m", module, *words], 1)
    assert_one_line(done.returncode, done.stderr, named)
    assert " numpy" in done.stderr or " click" in done.stderr
    assert "deepspeed\n" not in done.stderr and "timm\n" not in done.stderr


def test_a_mistake_of_one_rank_alone_is_told_by_all(tmp_path):
    make.pairs(tmp_path / "pairs-0")
    words = argv("train --data {here}/pairs-{{rank}}", tmp_path)[1]
    first, second = ranks.commands([str(ranks.ROOT / "ds_cmli" / "train.py"), *words], 2)
    assert_one_line(first.returncode, first.stderr, "rank 1: ")
    assert str(tmp_path / "pairs-1") in first.stderr and second.returncode == 2
    assert "Traceback" not in second.stderr


def test_an_output_folder_that_ranks_do_not_share_is_told(tmp_path):
    for rank in (0, 1):
        (tmp_path / f"node-{rank}").mkdir()
    words = argv(f"train --data {make.pairs(tmp_path / 'pairs')} --output-dir run", tmp_path)[1]
    script = str(ranks.ROOT / "ds_cmli" / "train.py")
    first, second = ranks.commands([script, *words], 2, tmp_path / "node-{rank}")
    assert_one_line(first.returncode, first.stderr, "--output-dir")
    assert second.returncode == 2 and "Traceback" not in second.stderr
