"""A job interrupted in two ways Slurm has, against the same run left alone: equal metrics and weights, to the bit.

What slurm/train.sh does in the others is shown by stand-ins in test_script.py, and what a training does at their
signals in tests/faults.
"""

import random
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.make import pairs
from tests.metrics_file import metrics
from tests.ranks import start_ranks
from tests.slurm.cluster import NODES, Cluster, poll
from tests.slurm.jobs import finish, log, steps_done, submit

pytestmark = pytest.mark.slurm

# Two ranks, on two nodes. The micro-batch makes a step long enough to be interrupted somewhere before the end.
TINY = ("--preset", "tiny", "--micro-batch", "128", "--set", "run.eval_batch=100", "--set", "run.match_maps=0")


def preempt(cluster: Cluster, job: str, folder: Path) -> None:
    """A job of the partition above wants all nodes."""
    wants = ("--partition=high", f"--nodes={len(NODES)}", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    other = cluster.submit(*wants)
    assert cluster.wait(other)["JobState"] == "COMPLETED"


def node_down(cluster: Cluster, job: str, folder: Path) -> None:
    cluster.command("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    try:
        cluster.wait(job, "PENDING")
        poll(lambda: "COMPLETING" not in cluster.command("sinfo", "-h", "-o", "%T").upper(), 60, lambda: "completing")
    finally:
        cluster.command("scontrol", "update", "nodename=n2", "state=idle")


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    """Of a training whose evaluation is quick."""
    return [*TINY, "--data", pairs(tmp_path_factory.mktemp("data") / "pairs", count=600)]


def straight(folder: Path, options: list[str]) -> list[subprocess.Popen]:
    """The ranks of the same run without interruption, started."""
    return start_ranks(["ds_cmli/train.py", *options, "--output-dir", folder], [folder.with_suffix(".log")] * 2)


def interrupted(
    cluster: Cluster, folder: Path, options: list[str], kinds: list[Callable], seed: int
) -> tuple[Path, str]:
    """A job that meets `kinds`, each at a random step; its folder and its log."""
    dice, steps = random.Random(seed), int(options[-1])
    request = ("--nodes=2", "--time=60", "--signal=TERM@90")
    job = submit(cluster, folder, request, *options)
    run = folder / "runs" / f"slurm-{job}"
    stops = [0]
    for number, kind in enumerate(kinds):
        # Otherwise two interruptions may meet one start.
        poll(lambda number=number: log(folder, job).count(", start ") > number, 120, lambda: log(folder, job))
        left = steps - stops[-1]
        target = stops[-1] + dice.randint(1, max(1, left // (len(kinds) + 2)))
        poll(lambda target=target: steps_done(run) >= target, 120, lambda: log(folder, job), interval=0.02)
        time.sleep(dice.random() * 0.3)
        kind(cluster, job, folder)
        cluster.wait(job, "PENDING", "RUNNING")
        stops.append(steps_done(run))
    text = finish(cluster, folder, job, timeout=900)
    assert int(cluster.job(job)["Restarts"]) >= len(kinds)
    print(f"stopped at steps {stops[1:]} by {[kind.__name__ for kind in kinds]}")
    assert stops[-1] < steps, "the last interruption came too late to matter"
    return run, text


def same(run: Path, other: Path) -> None:
    assert metrics(run) == metrics(other)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (run, other)]
    assert weights[0] == weights[1]


def test_steps_with_interruptions_equal_as_many_straight(cluster, tmp_path, options):
    request = [*options, "--steps", "24"]
    reference = straight(tmp_path / "straight", request)
    started = time.monotonic()
    run, text = interrupted(cluster, tmp_path, request, [preempt, node_down], seed=random.randrange(1000))
    print(f"{time.monotonic() - started:.0f} s")
    assert [rank.wait(240) for rank in reference] == [0, 0]
    same(run, tmp_path / "straight")
    assert text.count("start ") >= 3
    assert "Traceback" not in text


def test_a_cancelled_job_is_saved_and_not_requeued(cluster, tmp_path):
    job = submit(cluster, tmp_path, (), *TINY, "--steps=1000")
    run = tmp_path / "runs" / f"slurm-{job}"
    poll(lambda: steps_done(run) >= 2, 120, lambda: log(tmp_path, job))
    cluster.command("scancel", job)
    text = finish(cluster, tmp_path, job, state="CANCELLED")
    poll(lambda: "preempted" in log(tmp_path, job), 30, lambda: text)
    assert cluster.job(job)["Restarts"] == "0"
    stopped = re.search(r"checkpoint step(\d+): ", text)
    assert stopped and int(stopped[1]) == steps_done(run)
    assert "requeued" not in log(tmp_path, job)
