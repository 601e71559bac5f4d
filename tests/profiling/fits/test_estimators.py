"""Each estimate of a program by hand, and what is said of all."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ds_cmli.common.errors import UserError
from profiling.fits.estimates import ESTIMATES, Program, of_file
from profiling.fits.estimators import WRAPPER, row, table

PROGRAM = """
import torch
first = torch.nn.Linear(30, 20)
other = torch.nn.Linear(20, 30)
model = torch.nn.Sequential(first, other, first, other)
with torch.autocast("cpu", torch.bfloat16):
    model(torch.ones(2, 30))
raise SystemExit
"""


def test_every_estimate_by_hand():
    """1,000 parameters, 600 of them in one layer: Adam in fp32 takes 16,000 B of them, without activations."""
    program = Program(Path("one.py"), 1, parameters=1000, largest=600, precision="fp32", fits=19_800)
    figures = row("one", program, 20_000, ESTIMATES)
    assert list(figures.estimates.values()) == [19_800, 20_196, 16_000, 20_000, 20_400, 16_000]
    assert list(figures.fails.values()) == [True, False, True, False, False, True]
    other = row("two", replace(program, precision="bf16", fits=20_000), 20_000, ESTIMATES)
    lines = list(table([figures, other], tuple(ESTIMATES)))
    assert lines[1] == "| `fits` | 2 | 0.50% | 1.00% | 50% |"
    assert lines[3] == "| accelerate | 2 | 40.00% | 60.00% | 100% |"  # in bf16 8 B a parameter


def test_an_estimate_of_another_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def estimate(program):\n    return 2 * program.fits if program.ranks == 1 else None\n")
    program = Program(Path("one.py"), 1, parameters=1000, largest=600, precision="fp32", fits=10)
    mine = {"mine": of_file(str(path), 10)}
    rows = [row("one", program, 20, mine), row("two", replace(program, ranks=2), 20, mine)]
    assert list(table(rows, ("mine",)))[1] == "| mine | 1 | 0.00% | 0.00% | 0% |"


@pytest.mark.parametrize(
    "text, problem",
    [
        ("x = 1", "has no function estimate(program): add it"),
        ("estimate = 1", "has no function estimate(program): add it"),
        ("1 / 0", "does not run: ZeroDivisionError: division by zero"),
        ("import no_such", "does not run: ModuleNotFoundError: No module named 'no_such'"),
        ("def f(", "does not run: SyntaxError: '(' was never closed (mine.py, line 1)"),
        ("raise SystemExit(3)", "does not run: SystemExit: 3"),
        ("while True: pass", "does not run: TimeoutError: not done after 0.2 s"),
    ],
)
def test_a_file_that_is_no_estimate_is_one_line(text, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(text)
    with pytest.raises(UserError) as raised:
        of_file("mine.py", 0.2 if "while" in text else 60)
    assert str(raised.value) == f"--estimate is 'mine.py', which {problem}"


@pytest.mark.parametrize(
    "body, problem",
    [
        ("return '1 GB'", "gives '1 GB' for one: return a number of bytes, or None"),
        ("return float('nan')", "gives nan for one: return a number of bytes, or None"),
        ("return True", "gives True for one: return a number of bytes, or None"),
        ("return -1", "gives -1 for one: return a number of bytes, or None"),
        ("return program.layers", "does not run with one: AttributeError: 'Program' object has no attribute 'layers'"),
        ("while True: pass", "does not run with one: TimeoutError: not done after 0.2 s"),
        ("exit()", "does not run with one: SystemExit: None"),
    ],
)
def test_an_estimate_that_fails_leaves_the_others(body, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(f"def estimate(program):\n    {body}\n")
    program = Program(Path("one.py"), 1, parameters=1000, largest=600, precision="fp32", fits=10)
    figures = row("one", program, 20, {"mine": of_file("mine.py", 0.2 if "while" in body else 60)} | ESTIMATES)
    assert capsys.readouterr().err == f"one: --estimate is 'mine.py', which {problem}\n"
    assert list(figures.estimates) == [*ESTIMATES]


def test_the_parameters_of_what_a_program_runs(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, WRAPPER, tmp_path / "out.json", tmp_path / "program.py"]
    subprocess.run(command, check=True, timeout=300)
    content = json.loads((tmp_path / "out.json").read_text())
    assert content == {"parameters": 2 * 600 + 50, "largest": 630, "precision": "fp32"}
