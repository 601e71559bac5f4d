"""An ablation as an array: `sbatch --array=... slurm/ablate.sh`."""

import os
import re
import sys

import pytest

from profiling.learning import records
from tests.conftest import ROOT
from tests.slurm.jobs import finish

pytestmark = pytest.mark.slurm

SCRIPT = str(ROOT / "slurm" / "ablate.sh")
PLAN = """\
preset = "tiny"
seeds = [0]
endpoints = ["eval/seen/combined/mean_recall"]
settings = { optim = { steps = 2 }, run = { eval_batch = 300, match_maps = 0 } }

[arms.exact]

[arms.cut]
loss.cmli_cut = 0.01
"""


@pytest.fixture
def submit(cluster, tmp_path):
    """A function that submits slurm/ablate.sh, with `python` in Python's place."""
    (tmp_path / "plan.toml").write_text(PLAN)

    def submitted(*sbatch: str, python: str = sys.executable) -> str:
        return cluster.submit(*sbatch, SCRIPT, "plan.toml", cwd=tmp_path, DS_CMLI_PYTHON=python, OMP_NUM_THREADS="1")

    return submitted


@pytest.fixture
def stand_in(tmp_path):
    """A program that stands for Python: it prints what it was given, and ends with 85 the first time that it runs."""
    file = tmp_path / "stand-in"
    file.write_text(f"""\
#!/bin/sh
case $1 in *check.py) exit ;; esac
echo "given: $*"
[ -e {tmp_path}/once ] && exit 0
touch {tmp_path}/once
exit 85
""")
    file.chmod(0o755)
    return str(file)


def test_a_job_that_was_stopped_is_requeued(cluster, submit, stand_in, tmp_path):
    job = submit(python=stand_in)
    text = finish(cluster, tmp_path, job, timeout=120)
    assert f"job {job}: preempted (exit code 85)" in text and f"job {job}: requeued\n" in text
    assert re.findall(r"given: (.*)", text) == [f"{os.path.realpath(ROOT)}/profiling/ablate.py plan.toml"] * 2
    assert cluster.job(job)["Restarts"] == "1"


@pytest.mark.soak
def test_an_array_trains_a_plan(cluster, submit, tmp_path):
    job = submit("--array=3-5:2")
    logs = [finish(cluster, tmp_path, f"{job}_{task}", timeout=600) for task in (3, 5)]
    assert "run 1 of 1: exact-0" in logs[0] and "run 1 of 1: cut-0" in logs[1]
    assert set(records.load(tmp_path / "plan.csv")) == {("exact", 0), ("cut", 0)}
