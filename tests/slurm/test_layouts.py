"""Nodes and tasks: `sbatch slurm/train.sh` against the same run without Slurm, and what it does with options."""

import re
import shutil
import sys
from itertools import groupby

import pytest

from ds_cmli.train import command
from tests.slurm.jobs import SCRIPT, finish, log, submit

pytestmark = pytest.mark.slurm

TINY = ("--preset", "tiny", "--steps", "3", "--set", "run.eval_batch=100")


STAND_IN = """\
#!/bin/sh
[ "$2" = network ] && exit
[ "$(basename $1)" = check.py ] && exec echo "check gpus $CUDA_VISIBLE_DEVICES"
shift
echo "task $SLURM_PROCID $SLURMD_NODENAME local $SLURM_LOCALID gpus $CUDA_VISIBLE_DEVICES cpus $SLURM_CPUS_PER_TASK" \
    "threads $OMP_NUM_THREADS: $*"
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A program that stands for Python and tells what a task was given."""
    file = tmp_path_factory.mktemp("stand-in") / "stand-in"
    file.write_text(STAND_IN)
    file.chmod(0o755)
    return str(file)


# sbatch options: (tasks on each of the nodes, or all where Slurm places them, GPUs a task sees, CPUs of a task)
LAYOUTS = {
    "": ([1], "", 1),
    "--nodes=2": ([1, 1], "", 1),
    "--ntasks=2 --cpus-per-task=3": ([2], "", 3),
    "--nodes=2 --ntasks=5": (5, "", 1),
    "--nodes=2 --ntasks=12 --cpus-per-task=6": (12, "", 6),
    "--nodes=2 --ntasks=5 --ntasks-per-node=3 --distribution=cyclic": (5, "", 1),
    "--nodes=2 --ntasks=3 --overcommit": (3, "", ""),
    "--gpus-per-node=2 --cpus-per-gpu=4": ([2], "0,1", 4),
    "--gpus=2 --ntasks-per-gpu=1": ([2], "0,1", 1),
    "--ntasks=2 --gpus-per-task=1": ([2], "0,1", 1),
    "--nodes=2 --gpus-per-node=2 --ntasks-per-node=2 --cpus-per-task=2": ([2, 2], "0,1", 2),
    "--nodes=2 --gpus=4 --cpus-per-gpu=2": ([2, 2], "0,1", 2),
    "--nodes=2 --gpus-per-node=1": ([1, 1], "0", 1),
    "--nodes=2 --exclusive": ([2, 2], "0,1", 32),
}


@pytest.fixture(scope="module")
def layouts(cluster, tmp_path_factory, stand_in):
    """All these jobs, submitted at once: their folder and their ids."""
    folder = tmp_path_factory.mktemp("layouts")
    given = ("--seed", "%a", "a b")
    env = {"DS_CMLI_PYTHON": stand_in, "OMP_NUM_THREADS": ""}
    return folder, {o: cluster.submit(*o.split(), SCRIPT, *given, cwd=folder, **env) for o in LAYOUTS}


@pytest.mark.parametrize("options", LAYOUTS)
def test_one_task_for_each_gpu(cluster, layouts, options):
    per_node, gpus, cpus = LAYOUTS[options]
    folder, jobs = layouts
    text = finish(cluster, folder, jobs[options])
    matches = re.findall(r"^task (\d+) (\S+) local (\d+) (.*)", text, re.MULTILINE)
    matches.sort(key=lambda line: int(line[0]))
    counts = [len(list(tasks)) for _, tasks in groupby(matches, key=lambda line: line[1])]  # ranks lie in blocks
    assert counts == per_node or (sum(counts) == per_node and len(counts) == 2), text
    local = [i for tasks in counts for i in range(tasks)]
    assert [(int(rank), int(at)) for rank, _, at, _ in matches] == list(enumerate(local))
    given = f"threads {cpus or 1}: --output-dir runs/slurm-{jobs[options]} --seed %a a b"
    assert {rest for *_, rest in matches} == {f"gpus {gpus} cpus {cpus} {given}"}
    assert text.count(f"check gpus {gpus}\n") == len(counts)
    assert f"job {jobs[options]}, start 0: {sum(counts)} tasks on {len(counts)} nodes" in text


def test_an_array_has_a_seed_and_a_folder_for_each_task(cluster, tmp_path, stand_in):
    job = submit(cluster, tmp_path, ("--array=3-4",), "--seed", "%a", python=stand_in)
    for task in (3, 4):
        text = finish(cluster, tmp_path, f"{job}_{task}")
        assert f": --output-dir runs/slurm-{job}_{task} --seed {task}\n" in text


def refused(cluster, folder, job: str) -> str:
    text = finish(cluster, folder, job, state="FAILED")
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert "Traceback" not in text and "error: " in text
    return text


BARE = "/usr/bin/env -i /usr/bin/python3 -S -I"  # a Python without packages
THEIRS = "is an option of sbatch: sbatch options go before the script"
# name: (sbatch options, variables, options of the script, what is said)
MISTAKES = {
    "python": ("", {"DS_CMLI_PYTHON": "/nowhere/python"}, "", "no '/nowhere/python': set DS_CMLI_PYTHON"),
    "package": ("", {"DS_CMLI_PYTHON": BARE}, "", "not find the package ds_cmli: set DS_CMLI_PYTHON"),
    "gpus": ("--nodes=2 --gpus=3", {}, "", "3 GPUs on 2 nodes are not the same number on each: ask with --gpus-per-n"),
    "uneven": (
        "--nodes=2 --ntasks=3 --gpus-per-task=1",
        {},
        "",
        "GPUs on 2 nodes are not the same number on each",
    ),
    "two jobs": ("--ntasks=1 : --ntasks=2", {}, "", "this is a heterogeneous job"),
    "long": ("", {}, "--steps 3 --nodes=2", f"error: --nodes=2 {THEIRS}: sbatch --nodes=2 ... slurm/train.sh"),
    "beginning": ("", {}, "--cpus-per 8", f"error: --cpus-per {THEIRS}"),
    "short": ("", {}, "-t 2", f"error: -t {THEIRS}"),
    "short and value": ("", {}, "-N2", f"error: -N2 {THEIRS}"),
    "setup": ("", {"DS_CMLI_SETUP": "echo $UNSET; false"}, "", "DS_CMLI_SETUP failed: echo $UNSET; false"),
    "address": ("--nodes=2", {"MASTER_ADDR": "127.0.0.1"}, "", "error: node n1: MASTER_ADDR is '127.0.0.1', by which"),
    "network": ("--nodes=2", {"GLOO_SOCKET_IFNAME": "none"}, "", "GLOO_SOCKET_IFNAME is 'none': set it to the network"),
}


@pytest.fixture(scope="module")
def mistakes(cluster, tmp_path_factory):
    """All these jobs, submitted at once: their folder and their ids."""
    folder = tmp_path_factory.mktemp("mistakes")
    jobs = {}
    for name, (sbatch, env, options, _) in MISTAKES.items():
        env = {"DS_CMLI_PYTHON": sys.executable, **env}
        jobs[name] = cluster.submit(*sbatch.split(), SCRIPT, *TINY, *options.split(), cwd=folder, **env)
    return folder, jobs


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_said(cluster, mistakes, name):
    if name == "address" and cluster.address == "127.0.0.1":
        pytest.skip("this machine has no network, so that 127.0.0.1 is right")
    folder, jobs = mistakes
    assert MISTAKES[name][-1] in refused(cluster, folder, jobs[name])


def test_options_of_train_py_are_not_taken_for_those_of_sbatch(cluster, tmp_path, stand_in):
    names = [name for option in command.params for name in option.opts if name.startswith("--")]
    job = submit(cluster, tmp_path, (), *names, "--output-dir=x", python=stand_in)
    assert f": {' '.join(names)} --output-dir=x\n" in finish(cluster, tmp_path, job)


def test_where_the_project_is_not(cluster, tmp_path):
    script = tmp_path / "away" / "slurm" / "train.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(SCRIPT, script)
    job = cluster.submit("--hold", str(script), "a b", cwd=tmp_path)
    script.unlink()
    cluster.command("scontrol", "release", job)
    text = refused(cluster, tmp_path, job)
    assert f"error: node n1: there is no {script} here: the project must be visible from all nodes" in text
    typed = f"sbatch --parsable --export=ALL < {SCRIPT}"
    job = cluster.command("bash", "-c", typed, cwd=tmp_path)
    assert f"not say where the project is: sbatch slurm/train.sh, or submit from the project's folder and not from " \
        f"{tmp_path}" in refused(cluster, tmp_path, job)  # fmt: skip


def test_granted_gpus_that_torch_does_not_see_are_said(cluster, tmp_path):
    command = f"env CUDA_VISIBLE_DEVICES= {sys.executable}"  # Slurm sets it to device files that are no GPUs
    job = submit(cluster, tmp_path, ("--nodes=2", "--gpus-per-node=2"), *TINY, python=command)
    text = refused(cluster, tmp_path, job)
    for node in ("n1", "n2"):
        assert f"error: node {node}: 2 GPUs are granted, but torch" in text


def test_a_users_mistake_is_one_line_and_not_repeated(cluster, tmp_path):
    job = submit(cluster, tmp_path, ("--ntasks=2",), "--preset", "tinny")
    text = finish(cluster, tmp_path, job, state="FAILED")
    assert text.count("error: --preset is 'tinny': did you mean 'tiny'?") == 1
    assert "Traceback" not in text and "requeued" not in text
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert log(tmp_path, job) == text
