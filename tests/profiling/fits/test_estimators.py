"""Each estimate of a program by hand, and what is said of all."""

import json
import subprocess
import sys

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
    totals = {"fits": {"reserved": 19_800}, "null": {"reserved": 20_000}}
    figures = row("one", totals, {"parameters": 1000, "largest": 600, "precision": "fp32"}, 0.02)
    assert list(figures.estimates.values()) == [19_800, 20_196, 16_000, 20_000, 20_400, 16_000]
    assert list(figures.fails.values()) == [True, False, True, False, False, True]
    totals["fits"]["reserved"] = 20_000
    other = row("two", totals, {"parameters": 1000, "largest": 600, "precision": "bf16"}, 0.02)
    lines = list(table([figures, other]))
    assert lines[1] == "| `fits` | 2 | 0.50% | 1.00% | 50% |"
    assert lines[3] == "| accelerate | 2 | 40.00% | 60.00% | 100% |"  # in bf16 8 B a parameter


def test_the_parameters_of_what_a_program_runs(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, WRAPPER, tmp_path / "out.json", tmp_path / "program.py"]
    subprocess.run(command, check=True, timeout=300)
    content = json.loads((tmp_path / "out.json").read_text())
    assert content == {"parameters": 2 * 600 + 50, "largest": 630, "precision": "fp32"}
