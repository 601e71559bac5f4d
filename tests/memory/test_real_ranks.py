"""The prediction against real gloo ranks: a few of the settings that `real_ranks.py` goes through."""

import subprocess
import sys

from tests.conftest import ROOT, clean_environment


def test_predicted_equals_what_real_ranks_take():
    script = [sys.executable, "-m", "tests.memory.real_ranks", "--ranks", "2", "--stage", "2", "3"]
    script += ["--accumulation", "2", "--checkpointing", "on", "--precision", "bf16"]
    done = subprocess.run(script, env=clean_environment(), cwd=ROOT, capture_output=True, text=True, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("predicted") == 2
