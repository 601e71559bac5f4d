"""The prediction against real gloo ranks: a few of the settings that `real_ranks.py` goes through."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT, clean_environment


@pytest.mark.parametrize("ranks, stage, exchange", [("1", "1", "gather"), ("2", "2", "gather"), ("3", "3", "ring")])
def test_predicted_equals_what_real_ranks_take(ranks, stage, exchange):
    script = [sys.executable, "-m", "tests.memory.real_ranks", "--ranks", ranks, "--stage", stage]
    script += ["--accumulation", "2", "--checkpointing", "on", "--precision", "bf16", "--exchange", exchange]
    done = subprocess.run(script, env=clean_environment(), cwd=ROOT, capture_output=True, text=True, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("predicted") == 1
    assert "predicted Count" not in done.stdout
