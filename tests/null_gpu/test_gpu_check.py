"""What `profiling/gpu_check.py` does on a GPU, on null GPUs."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.gpu import limits

pytestmark = [pytest.mark.null_gpu, pytest.mark.soak]
COMMAND = [sys.executable, str(ROOT / "profiling" / "gpu_check.py"), "--json", "found.json", "--markdown", "found.md"]


def test_killed_it_keeps_what_it_has(null_gpu, tmp_path):
    command, env = [*COMMAND, "--only", "test_two_gpus or paper"], null_gpu("3090", count=2)
    run = subprocess.Popen(command, env=env, cwd=tmp_path, process_group=0)
    entry, limit = tmp_path / "found.json", limits.Limit(run.pid, 300)
    while not entry.exists() and run.poll() is None and not limit.exceeded():
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGKILL)
    content = json.loads(entry.read_text())
    assert content["done"] == 1 and content["tests"] > 2 and content["device"].startswith("a null GPU (")
    assert {(row["test"], row["note"]) for row in content["rows"]} == {
        ("test_two_gpus_give_the_gradients_of_one", "not real on a null GPU")
    }
    assert "1 of 6 tests, 2 figures, 0 missed their bar." in (tmp_path / "found.md").read_text()


def test_whole(null_gpu, tmp_path):
    run = [*COMMAND, "--minutes", "120"]
    # Memory that waits until another stream has read it is not predicted: here it does not wait.
    env = null_gpu("3090", count=2) | {"NULLGPU_EVENTS": "done"}
    done = subprocess.run(run, env=env, cwd=tmp_path, capture_output=True, text=True)
    print(done.stdout, (tmp_path / "found.md").read_text())
    content = json.loads((tmp_path / "found.json").read_text())
    assert content["done"] == content["tests"] and done.returncode == 0
