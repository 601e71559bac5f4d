"""A job interrupted in every way Slurm has, against the same run left alone: equal metrics and weights, to the bit."""

import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import ROOT, clean_environment, free_port
from tests.slurm.cluster import Cluster, poll
from tests.slurm.jobs import finish, log, metrics, steps_done, submit

# Two ranks, on two nodes. The micro-batch makes a step long enough to be interrupted somewhere before the end.
TINY = ("--preset", "tiny", "--micro-batch", "96", "--set", "run.eval_batch=100")
SAVED_BY_SIGNAL = "preempted (exit code 85)"


def term(cluster: Cluster, job: str) -> None:
    cluster.command("scancel", "--signal=TERM", job)


def user_signal_to_the_shell(cluster: Cluster, job: str) -> None:
    cluster.command("scancel", "--batch", "--signal=USR2", job)


def requeue(cluster: Cluster, job: str) -> None:
    cluster.command("scontrol", "requeue", job)


def preempt(cluster: Cluster, job: str) -> None:
    """A job of the partition above wants all nodes."""
    wants = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    other = cluster.submit(*wants)
    assert cluster.wait(other)["JobState"] == "COMPLETED"


def node_down(cluster: Cluster, job: str) -> None:
    cluster.command("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    try:
        cluster.wait(job, "PENDING")
        poll(lambda: "COMPLETING" not in cluster.command("sinfo", "-h", "-o", "%T").upper(), 60, lambda: "completing")
    finally:
        cluster.command("scontrol", "update", "nodename=n2", "state=idle")


KINDS: list[Callable[[Cluster, str], None]] = [term, requeue, preempt, node_down, user_signal_to_the_shell]


def straight(folder: Path, steps: int) -> subprocess.Popen:
    """The same run without interruption, started."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    command += [str(ROOT / "ds_cmli" / "train.py"), *TINY, f"--steps={steps}", "--output-dir", str(folder)]
    env = clean_environment() | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL)


def time_limit(cluster: Cluster, folder: Path, job: str) -> None:
    """Wait for the warning before the job's limit of one minute, then lift the limit."""
    poll(lambda: SAVED_BY_SIGNAL in log(folder, job), 90, lambda: log(folder, job))
    cluster.wait(job, "PENDING", "RUNNING")
    cluster.command("scontrol", "update", f"jobid={job}", "TimeLimit=60")


def interrupted(cluster: Cluster, folder: Path, steps: int, kinds: list[Callable], seed: int) -> tuple[Path, str]:
    """A job that meets first its time limit and then `kinds`, each at a random step; its folder and its log."""
    dice = random.Random(seed)
    # Slurm looks at time limits every 30 s: leave the job time for a few steps before it does.
    left = cluster.until_limits_are_checked()
    time.sleep(left if left < 15 else 0)
    job = submit(cluster, folder, ("--nodes=2", "--time=1", "--signal=TERM@90"), *TINY, f"--steps={steps}")
    run = folder / "runs" / f"slurm-{job}"
    time_limit(cluster, folder, job)
    stops = [steps_done(run)]
    for kind in kinds:
        cluster.wait(job, "RUNNING")
        left = steps - stops[-1]
        target = stops[-1] + dice.randint(1, max(1, left // (len(kinds) + 2)))
        poll(lambda target=target: steps_done(run) >= target, 120, lambda: log(folder, job), interval=0.02)
        time.sleep(dice.random() * 0.3)
        kind(cluster, job)
        cluster.wait(job, "PENDING", "RUNNING")
        stops.append(steps_done(run))
    text = finish(cluster, folder, job, timeout=240)
    assert int(cluster.job(job)["Restarts"]) >= len(kinds) + 1
    print(f"stopped at steps {stops} by {['time_limit', *(kind.__name__ for kind in kinds)]}")
    assert stops[-1] < steps, "the last interruption came too late to matter"
    return run, text


def same(run: Path, other: Path) -> None:
    assert metrics(run) == metrics(other)
    weights = [(folder / "student.safetensors").read_bytes() for folder in (run, other)]
    assert weights[0] == weights[1]


def test_forty_steps_with_six_interruptions_equal_forty_straight(cluster, tmp_path):
    reference = straight(tmp_path / "straight", 40)
    started = time.monotonic()
    run, text = interrupted(cluster, tmp_path, 40, KINDS, seed=random.randrange(1000))
    print(f"{time.monotonic() - started:.0f} s")
    assert reference.wait(240) == 0
    same(run, tmp_path / "straight")
    assert text.count("start ") >= len(KINDS) + 2
    assert "Traceback" not in text
