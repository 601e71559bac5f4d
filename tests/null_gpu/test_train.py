"""Training runs whole on a null GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.make import pairs
from tests.null_gpu.processes import run
from tests.ranks import ROOT

pytestmark = pytest.mark.null_gpu


def train(environment: dict[str, str], folder: Path, *options: str) -> subprocess.CompletedProcess:
    """In a fresh process, which finds its device by itself."""
    command = [sys.executable, str(ROOT / "ds_cmli" / "train.py"), "--output-dir", str(folder), *options]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_tiny_trains_in_fp16(null_gpu, tmp_path):
    (tmp_path / "ds.json").write_text('{"fp16": {"enabled": true}, "zero_optimization": {"stage": 2}}')
    options = ["--preset", "tiny", "--steps", "3", "--deepspeed_config", str(tmp_path / "ds.json")]
    options += ["--data", pairs(tmp_path / "pairs", count=64)]  # an evaluation of a few pairs
    done = train(null_gpu("3090"), tmp_path / "run", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert all(line["skipped_steps"] == 0 for line in lines if "loss" in line)


def test_the_profile_of_memory_leaves_out_what_came_before_the_steps(null_gpu, tmp_path):
    (tmp_path / "ds.json").write_text('{"fp16": {"enabled": true}, "zero_optimization": {"stage": 2}}')
    options = ["--preset", "tiny", "--steps", "2", "--deepspeed_config", str(tmp_path / "ds.json")]
    options += ["--data", pairs(tmp_path / "pairs", count=64), "--output-dir", str(tmp_path / "run")]
    done = run(null_gpu("a100"), "ds_cmli/train.py", *options, "--profile-memory", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "run" / "memory.json").read_text())
    predicted, measured = (content[name]["totals"]["requested"] for name in ("prediction", "measurement"))
    # Measuring the GPU's peak FLOPs, before the steps, takes 192 MB more.
    assert abs(predicted - measured) <= 1e-3 * measured, (predicted, measured)
