"""A job interrupted in every way Slurm has, against the same run left alone: equal metrics and weights, to the bit.

The ordinary run has two of the ways. What slurm/train.sh does in the others is shown by stand-ins in test_script.py,
and what a training does at their signals in tests/faults.
"""

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.config.test_mistakes import pairs
from tests.conftest import ROOT, rank_environments
from tests.metrics_file import metrics
from tests.processes import Program, python
from tests.slurm.cluster import NODES, Cluster, poll
from tests.slurm.jobs import finish, log, steps_done, submit

pytestmark = pytest.mark.slurm

# Two ranks, on two nodes. The micro-batch makes a step long enough to be interrupted somewhere before the end.
TINY = ("--preset", "tiny", "--micro-batch", "128", "--set", "run.eval_batch=100", "--set", "run.match_maps=0")
SAVED_BY_SIGNAL = "preempted (exit code 85)"


def term(cluster: Cluster, job: str, folder: Path) -> None:
    cluster.command("scancel", "--signal=TERM", job)


def user_signal_to_the_shell(cluster: Cluster, job: str, folder: Path) -> None:
    cluster.command("scancel", "--batch", "--signal=USR2", job)


def sent(*options: str) -> Callable[[Cluster, str, Path], None]:
    """The end of the start by `scancel OPTIONS`, which the script requeues."""

    def send(cluster: Cluster, job: str, folder: Path) -> None:
        before = cluster.job(job)["Restarts"]
        cluster.command("scancel", *options, job)
        poll(lambda: cluster.job(job)["Restarts"] != before, 60, lambda: f"{options}: {log(folder, job)}")

    send.__name__ = " ".join(options)
    return send


def requeue(cluster: Cluster, job: str, folder: Path) -> None:
    cluster.command("scontrol", "requeue", job)


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


def time_limit(cluster: Cluster, job: str, folder: Path) -> None:
    """Lower the job's limit to 60 to 120 s from now, wait for the warning 90 s before it, and lift the limit.

    Until it comes the tasks stand still: a fast machine would be through before Slurm looks. It sends CONT with it.
    """
    cluster.command("scancel", "--signal=STOP", job)
    hours, minutes, _ = map(int, cluster.job(job)["RunTime"].split(":"))
    cluster.command("scontrol", "update", f"jobid={job}", f"TimeLimit={60 * hours + minutes + 2}")
    saved = log(folder, job).count(SAVED_BY_SIGNAL)
    poll(lambda: log(folder, job).count(SAVED_BY_SIGNAL) > saved, 90, lambda: log(folder, job))
    cluster.wait(job, "PENDING", "RUNNING")
    cluster.command("scontrol", "update", f"jobid={job}", "TimeLimit=60")


KINDS: list[Callable[[Cluster, str, Path], None]] = [
    *(time_limit, term, requeue, preempt, node_down, user_signal_to_the_shell)
]
QUICK = [preempt, node_down]
NAMES = ("TERM", "INT", "HUP", "QUIT", "USR1", "USR2")
SIGNALS = [sent(*to, f"--signal={name}") for to in ((), ("--batch",), ("--full",)) for name in NAMES]


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    """Of a training whose evaluation is quick."""
    return [*TINY, "--data", pairs(tmp_path_factory.mktemp("data") / "pairs", count=600)]


def straight(folder: Path, options: list[str], ranks: int = 2) -> list[Program]:
    """The ranks of the same run without interruption, started."""
    command = [str(ROOT / "ds_cmli" / "train.py"), *options, "--output-dir", str(folder)]
    return [Program(command, env, ROOT, folder.with_suffix(".log")) for env in rank_environments(ranks)]


def interrupted(
    cluster: Cluster, folder: Path, options: list[str], kinds: list[Callable], seed: int, *request: str
) -> tuple[Path, str]:
    """A job that meets `kinds`, each at a random step; its folder and its log.

    Args:
        asked: options of sbatch; of an array the last task meets them.
    """
    dice, steps = random.Random(seed), int(options[-1])
    request = (*(request or ("--nodes=2",)), "--time=60", "--signal=TERM@90")
    job = submit(cluster, folder, request, *options, python=python())
    if request[0].startswith("--array=0-"):
        job += f"_{request[0].removeprefix('--array=0-')}"
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
    weights = [(folder / "student.safetensors").read_bytes() for folder in (run, other)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("steps, kinds", [(24, QUICK), pytest.param(120, KINDS, marks=pytest.mark.soak)])
def test_steps_with_interruptions_equal_as_many_straight(cluster, tmp_path, options, steps, kinds):
    request = [*options, "--steps", str(steps)]
    reference = straight(tmp_path / "straight", request)
    started = time.monotonic()
    run, text = interrupted(cluster, tmp_path, request, kinds, seed=random.randrange(1000))
    print(f"{time.monotonic() - started:.0f} s")
    assert [rank.wait(240) for rank in reference] == [0, 0]
    same(run, tmp_path / "straight")
    assert text.count("start ") >= len(kinds) + 1
    assert "Traceback" not in text


@pytest.mark.soak
def test_every_signal_to_a_job_on_three_nodes(cluster, tmp_path, options):
    request = [*options, "--steps", "120"]
    reference = straight(tmp_path / "straight", request, ranks=3)
    run, text = interrupted(cluster, tmp_path, request, [*KINDS, *SIGNALS], 1, "--nodes=3")
    assert [rank.wait(600) for rank in reference] == [0] * 3
    same(run, tmp_path / "straight")
    assert "Traceback" not in text


@pytest.mark.soak
def test_every_signal_to_the_last_task_of_an_array(cluster, tmp_path, options):
    """Its number is the array's, by which Slurm would requeue the others, one of which has ended and one not."""
    request = [*options, "--steps", "300"]
    reference = straight(tmp_path / "straight", [*options, "--seed", "2", "--steps", "300"], ranks=1)
    kinds = [time_limit, term, requeue, user_signal_to_the_shell, *SIGNALS]
    run, text = interrupted(cluster, tmp_path, [*options, "--seed", "%a", "--steps", "300"], kinds, 2, "--array=0-2")
    assert reference[0].wait(600) == 0
    same(run, tmp_path / "straight")
    assert "Traceback" not in text
    array = run.name.removeprefix("slurm-").removesuffix("_2")
    for task in (0, 1):
        finish(cluster, tmp_path, f"{array}_{task}", timeout=600)
        assert cluster.job(f"{array}_{task}")["Restarts"] == "0"
        assert steps_done(run.with_name(f"slurm-{array}_{task}")) == int(request[-1])


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(5))
def test_three_times_as_many_interruptions(cluster, tmp_path, options, seed):
    request = [*options, "--steps", "120"]
    reference = straight(tmp_path / "straight", request)
    kinds = [time_limit, *random.Random(seed).sample(3 * KINDS[1:], 3 * len(KINDS[1:]))]
    run, text = interrupted(cluster, tmp_path, request, kinds, seed)
    assert [rank.wait(600) for rank in reference] == [0, 0]
    same(run, tmp_path / "straight")
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


def test_a_start_that_slurm_has_lost_sight_of_writes_no_more(cluster, tmp_path):
    """A node's slurmd dies and its task lives on, while the job is requeued to the other node."""
    job = submit(cluster, tmp_path, (), *TINY, "--steps=100000", "--save-every=2", python=python())
    run = tmp_path / "runs" / f"slurm-{job}"
    poll(lambda: steps_done(run) >= 3, 120, lambda: log(tmp_path, job))
    node, old = cluster.job(job)["BatchHost"], Path(f"/proc/{task(job, rank=0)}")
    cluster.kill_node(node)
    try:
        cluster.command("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        poll(lambda: not old.exists(), 240, lambda: log(tmp_path, job))
        owner, start = json.loads((run / "run.lock").read_text())["job"]
        assert owner == job and int(start) >= 1  # it ended because of that; on a slow machine Slurm may requeue twice
        ended = steps_done(run)
        poll(lambda: steps_done(run) >= ended + 3, 120, lambda: log(tmp_path, job))
    finally:
        cluster.command("scancel", job)
        cluster.start_node(node)
        # Refused where the node's return has been noticed already.
        cluster.command("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        cluster.wait_idle()
    assert cluster.job(job)["Restarts"] != "0" and "requeued" not in log(tmp_path, job)
    steps = re.findall(r'"step": (\d+), "loss"', (run / "metrics.jsonl").read_text())
    assert [int(step) for step in steps] == list(range(1, len(steps) + 1))


@pytest.mark.soak
def test_a_killed_rank_ends_the_job_with_a_line_of_the_rank_and_one_of_the_task(cluster, tmp_path):
    job = submit(cluster, tmp_path, ("--nodes=2",), *TINY, "--steps=1000", "--set", "run.watchdog=10")
    run = tmp_path / "runs" / f"slurm-{job}"
    poll(lambda: steps_done(run) >= 2, 120, lambda: log(tmp_path, job))
    os.kill(task(job, rank=1), signal.SIGKILL)
    killed = time.monotonic()
    text = finish(cluster, tmp_path, job, state="FAILED", timeout=40)
    dead, killed_task = [line for line in text.splitlines() if line.startswith("error: ")]
    print(f"{time.monotonic() - killed:.1f} s: {dead}")
    assert dead.startswith("error: rank 1 on node n2 is dead") and "ask for more with --mem" in killed_task
    assert "Traceback" not in text and "requeued" not in text


def task(job: str, rank: int) -> int:
    """The process id of a job's task."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, given = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:
            continue
        if b"train.py" in command and b"SLURM_STEP_ID=" in given and wanted <= set(given.split(b"\0")):
            return int(process.name)
    raise AssertionError(f"no process of rank {rank} of job {job}")
