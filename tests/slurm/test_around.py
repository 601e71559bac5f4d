"""What slurm/train.sh does around a run, with a stand-in in Python's place."""

import shutil
import sys
from functools import partial
from typing import NamedTuple

import pytest

from tests.ranks import ROOT
from tests.slurm.cluster import Cluster, poll
from tests.slurm.jobs import finish, log

pytestmark = pytest.mark.slurm

SCRIPT = str(ROOT / "slurm" / "train.sh")
ONCE = "[[ $SLURM_RESTART_COUNT ]] && exit 0; {}"


class Case(NamedTuple):
    sbatch: str  # options
    env: dict[str, str]
    train: str  # what is run
    ends: tuple[str, str]  # the job's state, and how often it has been requeued
    said: str
    unsaid: str = "line "  # as bash says where the script is wrong
    folder: str = ""


CASES = {
    "the name of a job": Case(
        "--job-name=a\tBatchFlag=0\tJobState=CANCELLED", {}, ONCE.format("exit 85"), ("COMPLETED", "1"), ": requeued\n"
    ),
    "a signal without a time": Case(
        "--time=2", {"SBATCH_SIGNAL": "TERM"}, "exit 0", ("COMPLETED", "0"), ", start 0: 1 tasks on 1 nodes", "notice"
    ),
    "a signal to the shell without a time": Case(
        "--time=1", {"SBATCH_SIGNAL": "B:USR1"}, "exit 0", ("COMPLETED", "0"), "limit is 60 s, and 60 s before it"
    ),
    "a signal with a time": Case(
        "--time=2", {"SBATCH_SIGNAL": "R:TERM@090"}, "exit 0", ("COMPLETED", "0"), "limit is 120 s, and 90 s before it"
    ),
    "TERM before it is handled": Case("", {}, ONCE.format("kill -TERM $$"), ("COMPLETED", "1"), "(exit code 143)"),
    "no step": Case("", {"DS_CMLI_REQUEUE_MOST": "1"}, "exit 85", ("FAILED", "0"), ": 1 starts in a row ended before"),
    "no folder": Case(
        "", {"DS_CMLI_REQUEUE_MOST": "2"}, "exit 85", ("FAILED", "1"), ": 2 starts in a row ended before",
        unsaid="unbound", folder="/dev/null/run",
    ),
    "no memory": Case("", {}, "kill -KILL $$", ("FAILED", "0"), "(exit code 137), as happens where a node's or the"),
    "two jobs": Case("--ntasks=1 : --ntasks=1", {}, "exit 0", ("FAILED", "0"), "this is a heterogeneous job"),
    "srun": Case("", {"DS_CMLI_SRUN": "--label --comment='a b'"}, "echo is", ("COMPLETED", "0"), "0: is\n"),
}  # fmt: skip


@pytest.fixture(scope="module")
def jobs(cluster, tmp_path_factory):
    """All cases, submitted at once: their folders and ids."""
    submitted = {}
    for name, case in CASES.items():
        folder = tmp_path_factory.mktemp("case")
        python = folder / "my python"
        python.write_text(f"#!/bin/bash\n[[ $1 == *check.py ]] && exit 0\n{case.train}\n")
        python.chmod(0o755)
        env = {"DS_CMLI_PYTHON": f"env 'A=b c' '{python}'", **case.env}
        sbatch = [word.replace("\t", " ") for word in case.sbatch.split(" ") if word]
        given = [f"--output-dir={case.folder}"] if case.folder else []
        submitted[name] = folder, cluster.submit(*sbatch, SCRIPT, *given, cwd=folder, **env)
    return submitted


@pytest.mark.parametrize("name", CASES)
def test_what_the_script_does(cluster, jobs, name):
    folder, job = jobs[name]
    case = CASES[name]
    text = finish(cluster, folder, job, state=case.ends[0])
    assert case.said in text and case.unsaid not in text, text
    assert cluster.job(job)["Restarts"] == case.ends[1]


def restarts(cluster: Cluster, array: str, tasks: int) -> list[str]:
    return [cluster.job(f"{array}_{task}")["Restarts"] for task in range(tasks)]


def test_the_last_task_of_an_array_is_requeued_alone(cluster, tmp_path, stand_in):
    python = stand_in(f"[[ $SLURM_ARRAY_TASK_ID != 2 ]] && exit 0; sleep 2; {ONCE.format('exit 85')}")
    array = cluster.submit("--array=0-2", SCRIPT, cwd=tmp_path, DS_CMLI_PYTHON=python)
    texts = [finish(cluster, tmp_path, f"{array}_{task}") for task in range(3)]
    assert f"job {array}_2: requeued\n" in texts[2], texts
    assert restarts(cluster, array, 3) == ["0", "0", "1"]
    assert cluster.job(f"{array}_2")["JobId"] == array  # what makes it the last


def test_a_job_that_ends_while_it_is_being_preempted_is_not_started_again(cluster, tmp_path, stand_in):
    python = stand_in(f"touch {tmp_path}/begun-$SLURM_JOB_ID; trap 'exit 0' TERM USR1; while true; do sleep 0.1; done")
    job = cluster.submit("--exclusive", "--time=60", SCRIPT, cwd=tmp_path, DS_CMLI_PYTHON=python)
    poll((tmp_path / f"begun-{job}").exists, 30, partial(log, tmp_path, job))
    cluster.submit("--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    cluster.wait(job, "PREEMPTED", "COMPLETED", timeout=60)
    text = log(tmp_path, job)
    assert cluster.job(job)["Restarts"] == "0" and "requeued" not in text, text
    cluster.wait_idle()


def test_a_second_checkout_runs_its_own_package(cluster, tmp_path):
    """The environment of this Python has another one's installed."""
    project = tmp_path / "second"
    shutil.copytree(ROOT / "slurm", project / "slurm")
    (project / "ds_cmli").mkdir()
    (project / "ds_cmli" / "train.py").write_text("import ds_cmli\nprint('runs', ds_cmli.__file__)\n")
    (project / "ds_cmli" / "__init__.py").touch()
    (project / "slurm" / "check.py").write_text("")
    job = cluster.submit(str(project / "slurm" / "train.sh"), cwd=tmp_path, DS_CMLI_PYTHON=sys.executable)
    text = finish(cluster, tmp_path, job)
    assert f"runs {project}/ds_cmli/__init__.py\n" in text and f"; code of {project}\n" in text, text
