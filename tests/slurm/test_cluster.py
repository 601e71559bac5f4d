"""slurm/train.sh on a real Slurm: trainings interrupted in the ways it has, and stand-ins in Python's place."""

import random
import re
import sys
import time
from pathlib import Path

import pytest

from tests.checkpoint.runs import assert_same
from tests.make import pairs
from tests.ranks import ROOT, poll, start_ranks
from tests.slurm.cluster import NODES, Cluster

pytestmark = pytest.mark.slurm

# The micro-batch makes a step long enough to be interrupted somewhere before the end.
TINY = ("--preset", "tiny", "--micro-batch", "128", "--set", "run.eval_batch=100", "--set", "run.match_maps=0")


class Job:
    """A job of slurm/train.sh. Its run and log are in `folder`; `stand_in` are bash commands in Python's place."""

    def __init__(self, cluster: Cluster, folder: Path, *sbatch: str, options=(), stand_in: str = "", **env: str):
        python = folder / f"python-{time.monotonic_ns()}"
        python.write_text("#!/bin/bash\n" + (stand_in or f'exec {sys.executable} "$@"'))
        python.chmod(0o755)
        self.cluster = cluster
        self.run = folder / "run"
        script = (str(ROOT / "slurm" / "train.sh"), "--output-dir", str(self.run), *options)
        env = {"DS_CMLI_PYTHON": str(python), "OMP_NUM_THREADS": "1", **env}
        self.id = cluster.submit(f"--output={folder}/%j.out", *sbatch, *script, **env)
        self.file = folder / f"{self.id}.out"

    @property
    def log(self) -> str:
        return self.file.read_text() if self.file.exists() else ""

    @property
    def restarts(self) -> int:
        return int(self.cluster.job(self.id)["Restarts"])

    def until(self, condition, seconds: float = 120) -> None:
        poll(condition, seconds, lambda: self.log)

    def ends(self, state: str = "COMPLETED", timeout: float = 240) -> str:
        """Wait until it has ended in this state, and return its log."""
        assert self.cluster.wait(self.id, timeout=timeout)["JobState"] == state, self.log
        return self.log

    def steps(self) -> int:
        """Return the last step in metrics.jsonl, 0 before the first."""
        file = self.run / "metrics.jsonl"
        matches = re.findall(r'^\{"step": (\d+),', file.read_text(), re.MULTILINE) if file.exists() else []
        return int(matches[-1]) if matches else 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def job(cluster, tmp_path):
    return lambda *sbatch, **more: Job(cluster, tmp_path, *sbatch, **more)


def test_a_preempted_run_equals_one_left_alone(cluster, job, tmp_path):
    options = [*TINY, "--data", pairs(tmp_path / "pairs", count=600), "--steps", "24"]
    preempted = job("--nodes=2", "--time=60", options=options)
    target = random.randint(1, 5)
    preempted.until(lambda: preempted.steps() >= target)
    # A job of the partition above wants all nodes.
    wants = ("--partition=high", f"--nodes={len(NODES)}", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    assert cluster.wait(cluster.submit(*wants))["JobState"] == "COMPLETED"
    text = preempted.ends(timeout=300)
    stopped = re.search(r"stopped at step (\d+) of 24", text)
    assert target <= int(stopped[1]) < 24, "the interruption came too late to matter"
    assert preempted.restarts == 1, text
    alone = tmp_path / "alone"
    ranks = start_ranks(["ds_cmli/train.py", *options, "--output-dir", alone], [tmp_path / "log"] * 2)
    assert [rank.wait(300) for rank in ranks] == [0, 0]
    assert_same(preempted.run, alone)


def test_a_cancelled_job_is_saved_and_not_requeued(cluster, job):
    cancelled = job(options=(*TINY, "--steps=1000"))
    cancelled.until(lambda: cancelled.steps() >= 2)
    cluster.command("scancel", cancelled.id)
    cancelled.ends("CANCELLED")
    cancelled.until(lambda: "stopped at step" in cancelled.log, 30)
    stopped = re.search(r"stopped at step (\d+) of 1000 by SIGTERM", cancelled.log)
    assert (cancelled.run / "checkpoint" / "latest").read_text() == f"step{stopped[1]}"
    assert cancelled.restarts == 0 and "requeued" not in cancelled.log


ONCE = "[[ $SLURM_RESTART_COUNT ]] && exit 0; {}"
# stand-in: sbatch's options, the variables, the job's state at its end, restarts, and what the log says
CASES = {
    ONCE.format("exit 85"): ((), {}, "COMPLETED", 1, ": to be requeued\n"),
    ONCE.format("kill -TERM $$"): ((), {}, "COMPLETED", 1, ": to be requeued\n"),
    ONCE.format("scontrol requeue $SLURM_JOB_ID; sleep 100"): ((), {}, "COMPLETED", 1, "start 1: 1 tasks"),
    "exit 85": ((), {"DS_CMLI_REQUEUE_MOST": "2"}, "FAILED", 2, "not requeued after 2 restarts"),
    "exit 85 # where that is forbidden": (("--no-requeue",), {}, "FAILED", 0, "saved and not requeued"),
    "echo nothing": (("--gpus-per-node=2",), {}, "FAILED", 0, "1 CPUs for 2 tasks on a node: give sbatch"),
    "[[ $SLURM_PROCID == 1 ]] && kill -STOP $$; exit 86": (("--nodes=2",), {}, "FAILED", 0, "or was lost"),
    ONCE.format("trap 'echo told; exit 85' TERM; for ((;;)); do sleep 0.1; done"): (
        ("--time=1", "--signal=TERM@50"), {}, "COMPLETED", 1, "told\n"
    ),
    'echo "task $SLURM_PROCID of $SLURM_NTASKS sees $CUDA_VISIBLE_DEVICES, $SLURM_CPUS_PER_TASK CPUs"': (
        ("--nodes=2", "--gpus-per-node=2", "--cpus-per-gpu=3"), {}, "COMPLETED", 0, "task 3 of 4 sees 0,1, 3 CPUs\n"
    ),
    'echo "$SLURMD_NODENAME: $SLURM_PROCID of $SLURM_NTASKS"': (
        ("--nodes=3", "--ntasks-per-node=2"), {}, "COMPLETED", 0, "n3: 5 of 6\n"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def jobs(cluster, tmp_path_factory):
    """All cases, submitted at once."""
    folder = tmp_path_factory.mktemp("cases")
    return {
        stand_in: Job(cluster, folder, *sbatch, stand_in=stand_in, **env)
        for stand_in, (sbatch, env, *_) in CASES.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_what_the_script_does(jobs, name):
    _, _, state, restarts, words = CASES[name]
    assert words in jobs[name].ends(state), jobs[name].log
    assert jobs[name].restarts == restarts


def test_a_job_goes_on_where_its_node_dies(cluster, job):
    """Its slurmd and all that it has started are gone at once, which Slurm notices after SlurmdTimeout."""
    lost = job("--nodelist=n2", stand_in=ONCE.format("echo begun; sleep 100"))
    lost.until(lambda: "begun" in lost.log)
    cluster.kill_node("n2")
    try:
        lost.until(lambda: lost.restarts == 1)
    finally:
        cluster.start_node("n2")
    lost.ends()


def test_the_last_task_of_an_array_is_requeued_alone(cluster, job):
    array = job("--array=0-2", stand_in=f"[[ $SLURM_ARRAY_TASK_ID != 2 ]] && exit 0; sleep 2; {ONCE.format('exit 85')}")
    ended = [cluster.wait(f"{array.id}_{task}") for task in range(3)]
    assert [(task["JobState"], task["Restarts"]) for task in ended] == [("COMPLETED", number) for number in "001"]
    assert ended[-1]["JobId"] == array.id  # what makes it the last
