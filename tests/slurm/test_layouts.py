"""Nodes and tasks: `sbatch slurm/train.sh` against the same run without Slurm, and what it does with options."""

import os
import sys

import pytest

from tests.conftest import free_port, run
from tests.metrics_file import metrics
from tests.slurm.jobs import finish, log, submit

TINY = ("--preset", "tiny", "--steps", "3", "--set", "run.eval_batch=100")
DEMO = ("--preset", "demo", "--steps", "2", "--log-every", "1", "--set", "run.eval_batch=100")
# name: (sbatch options, nodes, ranks)
RUNS = {
    "1 node x 1": ((), 1, 1),
    "1 node x 2": (("--ntasks-per-node=2",), 1, 2),
    "2 nodes x 2": (("--nodes=2", "--ntasks-per-node=2"), 2, 4),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_job_trains_as_the_same_run_without_slurm(cluster, tmp_path, name):
    sbatch, nodes, ranks = RUNS[name]
    options = (*DEMO, "--micro-batch", str(8 // ranks))
    job = submit(cluster, tmp_path, sbatch, *options)
    text = finish(cluster, tmp_path, job, timeout=300)
    assert f"job {job}, start 0: {ranks} tasks on {nodes} nodes" in text
    torchrun = os.path.join(os.path.dirname(sys.executable), "torchrun")
    launcher = (torchrun, "--nproc_per_node", str(ranks), "--master_port", str(free_port()))
    done = run(*options, "--output-dir", str(tmp_path / "plain"), launcher=launcher if ranks > 1 else (sys.executable,))
    assert done.returncode == 0, done.stdout + done.stderr
    assert metrics(tmp_path / "runs" / f"slurm-{job}") == metrics(tmp_path / "plain")


@pytest.fixture
def stand_in(tmp_path):
    """A program that stands for Python and tells what a task was given."""
    file = tmp_path / "stand-in"
    file.write_text(
        '#!/bin/sh\n[ "$(basename $1)" = check.py ] && exit 0\nshift\n'
        'echo "task $SLURM_PROCID local $SLURM_LOCALID gpus $CUDA_VISIBLE_DEVICES cpus $SLURM_CPUS_PER_TASK: $*"\n'
    )
    file.chmod(0o755)
    return str(file)


# sbatch options: (tasks on each of the nodes, GPUs a task sees, CPUs of a task)
LAYOUTS = {
    "": ([1], "", 1),
    "--nodes=2": ([1, 1], "", 1),
    "--ntasks=2 --cpus-per-task=3": ([2], "", 3),
    "--gpus-per-node=2 --cpus-per-gpu=4": ([2], "0,1", 4),
    "--gpus=2 --ntasks-per-gpu=1": ([2], "0,1", 1),
    "--nodes=2 --gpus-per-node=2 --ntasks-per-node=2 --cpus-per-task=2": ([2, 2], "0,1", 2),
    "--nodes=2 --gpus=4 --cpus-per-gpu=2": ([2, 2], "0,1", 2),
    "--nodes=2 --gpus-per-node=1": ([1, 1], "0", 1),
}


@pytest.mark.parametrize("options", LAYOUTS)
def test_one_task_for_each_gpu(cluster, tmp_path, stand_in, options):
    per_node, gpus, cpus = LAYOUTS[options]
    job = submit(cluster, tmp_path, tuple(options.split()), "--seed", "%a", "a b", python=stand_in)
    text = finish(cluster, tmp_path, job)
    local = [i for tasks in per_node for i in range(tasks)]
    given = f"--output-dir runs/slurm-{job} --seed %a a b"
    expected = [f"task {r} local {i} gpus {gpus} cpus {cpus}: {given}" for r, i in enumerate(local)]
    assert sorted(line for line in text.splitlines() if line.startswith("task ")) == expected, text


def test_an_array_has_a_seed_and_a_folder_for_each_task(cluster, tmp_path, stand_in):
    job = submit(cluster, tmp_path, ("--array=3-4",), "--seed", "%a", python=stand_in)
    for task in (3, 4):
        text = finish(cluster, tmp_path, f"{job}_{task}")
        assert f": --output-dir runs/slurm-{job}_{task} --seed {task}\n" in text


def refused(cluster, tmp_path, *sbatch: str, python: str = sys.executable) -> str:
    job = submit(cluster, tmp_path, sbatch, *TINY, python=python)
    text = finish(cluster, tmp_path, job, state="FAILED")
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert "Traceback" not in text and "error: " in text
    return text


def test_what_is_missing_is_said(cluster, tmp_path):
    assert "no '/nowhere/python': set DS_CMLI_PYTHON" in refused(cluster, tmp_path, python="/nowhere/python")
    bare = "/usr/bin/env -i /usr/bin/python3 -S -I"  # a Python without packages
    assert "does not find the package ds_cmli: set DS_CMLI_PYTHON, or pip install" in refused(
        cluster, tmp_path, python=bare
    )
    odd = refused(cluster, tmp_path, "--nodes=2", "--gpus=3")
    assert "3 GPUs on 2 nodes are not the same number on each: ask with --gpus-per-node" in odd


def test_granted_gpus_that_torch_does_not_see_are_said(cluster, tmp_path):
    text = refused(cluster, tmp_path, "--nodes=2", "--gpus-per-node=2")  # of device files that are no GPUs
    for node in ("n1", "n2"):
        assert f"error: node {node}: 2 GPUs are granted, but torch" in text


def test_a_users_mistake_is_one_line_and_not_repeated(cluster, tmp_path):
    job = submit(cluster, tmp_path, ("--ntasks=2",), "--preset", "tinny")
    text = finish(cluster, tmp_path, job, state="FAILED")
    assert text.count("error: --preset is 'tinny': did you mean 'tiny'?") == 1
    assert "Traceback" not in text and "requeued" not in text
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert log(tmp_path, job) == text
