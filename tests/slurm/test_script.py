"""What slurm/train.sh does around a run: requeueing and its limit, odd paths, salloc, and what the tasks are given.

A stand-in takes Python's place: `check` and `train` are what it does as one and as the other.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.ranks import ROOT
from tests.slurm.cluster import poll
from tests.slurm.jobs import SCRIPT, finish, log, submit

pytestmark = pytest.mark.slurm


def test_a_signal_during_the_node_check_requeues_the_job(cluster, tmp_path, stand_in):
    own = f"{tmp_path}/checking-$SLURM_JOB_ID"
    python = stand_in("echo trained", f"[[ -e {own} ]] && exit 0; touch {own}; exec sleep 60")
    signals = (("--signal=TERM",), ("--signal=USR1",), ("--batch", "--signal=USR1"), ("--batch", "--signal=HUP"))
    jobs = {submit(cluster, tmp_path, (), python=python): signal for signal in signals}
    for job, to in jobs.items():
        mark = tmp_path / f"checking-{job}"
        poll(mark.exists, 30, lambda job=job: log(tmp_path, job), interval=0.05)
        cluster.command("scancel", *to, job)
    for job, to in jobs.items():
        text = finish(cluster, tmp_path, job, timeout=60)
        assert "requeued" in text and "trained" in text and "not started" not in text, (to, text)
        assert cluster.job(job)["Restarts"] == "1"


# A training that is told to stop, the first time: it names the signal, and ends as one that has saved.
TOLD = """
    if [[ -e {0} ]]; then echo went on; exit 0; fi
    for name in TERM USR1; do trap "echo told by $name; touch {0}; exit 85" $name; done
    touch {0}.begun; while true; do sleep 0.1; done
"""


@pytest.fixture(scope="module")
def limited(cluster, tmp_path_factory):
    """A job that Slurm warns 90 s before its time limit of 180 s, or a minute earlier: it runs beside the others."""
    folder = tmp_path_factory.mktemp("limited")
    file = folder / "stand-in"
    file.write_text(f"#!/bin/bash\n[[ $1 == *train.py ]] || exit 0\n{TOLD.format(folder / 'told')}")
    file.chmod(0o755)
    return folder, submit(cluster, folder, ("--time=3",), python=str(file))


@pytest.fixture(autouse=True)
def begun_before(limited):
    """With the first test of this file."""


def test_a_signal_to_the_shell_reaches_the_tasks_and_the_job_is_requeued(cluster, tmp_path, stand_in):
    lines = tmp_path / "told"
    job = submit(cluster, tmp_path, ("--nodes=2", "--time=60"), python=stand_in(TOLD.format(f"{lines}-$SLURM_PROCID")))
    for rank in "01":
        poll((tmp_path / f"told-{rank}.begun").exists, 30, lambda: log(tmp_path, job), interval=0.05)
    cluster.command("scancel", "--batch", "--signal=USR2", job)
    text = finish(cluster, tmp_path, job, timeout=60)
    assert text.count("told by USR1") == 2 and text.count("went on") == 2, text
    assert "preempted (exit code 85)" in text and f"job {job}: requeued\n" in text


def test_a_job_that_gains_no_step_is_not_requeued_for_ever(cluster, tmp_path, stand_in):
    job = submit(cluster, tmp_path, ("--time=2",), python=stand_in("exit 85"))
    text = finish(cluster, tmp_path, job, state="FAILED", timeout=90)
    assert len(re.findall(r", start \d: ", text)) == 3 and text.count(": requeued\n") == 2
    assert re.search(r"error: job \d+: 3 starts in a row ended before they had gained a step: not requeued", text)
    assert "notice: the time limit is 120 s, and 90 s before it the run gets its signal" in text
    assert text.count("before a step was gained: ") == 2


def test_a_job_that_gains_steps_is_requeued_as_often_as_it_takes(cluster, tmp_path, stand_in):
    again = (
        "mkdir -p $run/checkpoint; n=$(($(grep -o [0-9]* $run/checkpoint/latest) + 1)); "
        "[[ $n == 3 ]] && exit 0; echo step$n > $run/checkpoint/latest; exit 85"
    )
    job = cluster.submit("--time=60", SCRIPT, "--output-dir", "my run", cwd=tmp_path, DS_CMLI_REQUEUE_MOST="1",
                         DS_CMLI_PYTHON=stand_in(again.replace("$run", '"$run"')))  # fmt: skip
    text = finish(cluster, tmp_path, job, timeout=90)
    assert text.count(": requeued\n") == 2 and "notice" not in text


def test_a_job_that_may_not_be_requeued_says_how_to_go_on(cluster, tmp_path, stand_in):
    python = stand_in("exit 85")
    job = submit(cluster, tmp_path, ("--time=60", "--no-requeue"), "--set", "a=b c", python=python)
    text = finish(cluster, tmp_path, job, state="FAILED", timeout=60)
    again = f"sbatch [sbatch options] {SCRIPT} --output-dir runs/slurm-{job} --set a=b\\ c"
    refusal = f"Requested operation is presently disabled for job {job}"
    assert text.endswith(f"job {job}: not requeued ({refusal}): to go on, in {tmp_path}: {again}\n"), text


def test_a_step_that_srun_kills_is_requeued_and_says_so(cluster, tmp_path, stand_in):
    mark = tmp_path / "training"
    python = stand_in(f"[[ -e {mark} ]] && exit 0; touch {mark}; exec sleep 60")
    job = submit(cluster, tmp_path, ("--time=60",), python=python)
    poll(mark.exists, 30, lambda: log(tmp_path, job), interval=0.05)
    cluster.command("scancel", "--full", "--signal=TERM", job)
    text = finish(cluster, tmp_path, job, timeout=60)
    # Whether srun's kill or the signal itself ends the task is a race, and the log names either.
    assert re.search(r"(told to stop, and ended before it had saved|preempted) \(exit code \d+\)", text), text
    assert f"job {job}: requeued\n" in text


def test_a_job_whose_node_does_not_answer_is_requeued(cluster, tmp_path, stand_in):
    """Its slurmd is gone, which Slurm itself notices later, after SlurmdTimeout."""
    mark = tmp_path / "training"
    fail = f"touch {mark}; sleep 2; exit $SLURM_PROCID"
    again = f"[[ $SLURM_RESTART_COUNT ]] && exit 0; {fail}"
    job = submit(cluster, tmp_path, ("--nodes=2", "--time=60"), python=stand_in(again))
    poll(mark.exists, 30, lambda: log(tmp_path, job), interval=0.05)
    cluster.kill_node("n2")
    try:
        poll(lambda: "requeued\n" in log(tmp_path, job), 60, lambda: log(tmp_path, job))
    finally:
        cluster.start_node("n2")
    text = finish(cluster, tmp_path, job, timeout=90)
    assert f"job {job}: node n2 does not answer (exit code" in text and "Task launch" not in text, text


def test_options_of_srun_a_setup_and_a_container(cluster, tmp_path, stand_in):
    python = stand_in('echo "$FLAVOUR $APPTAINER_CONTAINER: $*"')
    apptainer = tmp_path / "bin" / "apptainer"
    apptainer.parent.mkdir()
    apptainer.write_text('#!/bin/bash\n[[ $1$2 == exec--nv ]] && APPTAINER_CONTAINER=$3 exec "${@:4}"\n')
    apptainer.chmod(0o755)
    env = {
        "DS_CMLI_SETUP": f"echo $NEVER_SET; export FLAVOUR='from the setup' PATH={apptainer.parent}:$PATH",
        "DS_CMLI_SRUN": "--label --comment='two words'",
        "DS_CMLI_PYTHON": f"apptainer exec --nv '{tmp_path}/my image.sif' {python}",
    }
    job = cluster.submit("--ntasks=2", SCRIPT, "--seed", "1", cwd=tmp_path, **env)
    text = finish(cluster, tmp_path, job)
    for rank in range(2):
        given = f"--output-dir runs/slurm-{job} --seed 1"
        assert f"{rank}: from the setup {tmp_path}/my image.sif: {given}\n" in text, text


def test_the_projects_environment_goes_before_condas_base(cluster, tmp_path, stand_in):
    project = tmp_path / "project"
    (project / "ds_cmli").mkdir(parents=True)
    (project / "ds_cmli" / "train.py").touch()
    shutil.copytree(ROOT / "slurm", project / "slurm")
    own = stand_in("echo runs .venv", name="project/.venv/bin/python")
    conda = stand_in("echo runs conda", name="conda/bin/python3")
    path = f"{tmp_path}/conda/bin:{os.environ['PATH']}"
    for name, runs in (("base", ".venv"), ("mine", "conda")):
        env = {"CONDA_PREFIX": f"{tmp_path}/conda", "CONDA_DEFAULT_ENV": name, "PATH": path, "VIRTUAL_ENV": ""}
        job = cluster.submit(str(project / "slurm" / "train.sh"), cwd=tmp_path, DS_CMLI_PYTHON="", **env)
        text = finish(cluster, tmp_path, job)
        assert f"runs {runs}\n" in text, (conda, text)
        assert (f"notice: runs {own} and not conda's base environment" in text) == (runs == ".venv")


def test_spaces_and_links_in_paths(cluster, tmp_path, stand_in):
    project = tmp_path / "my projects" / "ds cmli"
    (project / "ds_cmli").mkdir(parents=True)
    (project / "ds_cmli" / "train.py").touch()
    shutil.copytree(ROOT / "slurm", project / "slurm")
    python = stand_in('echo "given $script: $*"', name="my env/bin/python")
    (tmp_path / "linked job").symlink_to(project / "slurm" / "train.sh")
    folder = tmp_path / "jobs of mine"
    folder.mkdir()
    for script in (project / "slurm" / "train.sh", tmp_path / "linked job"):
        for command in (python, f"env 'A=b c' '{python}'"):
            job = cluster.submit(str(script), "a b", cwd=folder, DS_CMLI_PYTHON=command)
            text = finish(cluster, folder, job)
            assert f"given {project}/ds_cmli/train.py: --output-dir runs/slurm-{job} a b\n" in text


def test_within_salloc(cluster, tmp_path, stand_in):
    python = stand_in('echo "task $SLURM_PROCID of $SLURM_NTASKS"; exit 85')
    command = ["salloc", "--nodes=2", "--gpus-per-node=2", "--cpus-per-gpu=2", "bash", SCRIPT, "--seed", "1"]
    env = cluster.environment() | {"DS_CMLI_PYTHON": python}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 85, done.stdout + done.stderr
    assert all(f"task {rank} of 4" in done.stdout for rank in range(4)), done.stdout + done.stderr
    assert "2 GPUs and 4 CPUs a node" in done.stdout
    assert "started within salloc, and so not requeued: start it again to go on" in done.stdout


def test_what_tasks_are_given(cluster, tmp_path, stand_in):
    names = "PYTHONFAULTHANDLER NCCL_DEBUG NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME TRITON_CACHE_DIR"
    python = stand_in(f'for name in {names}; do echo "rank $SLURM_PROCID: $name=${{!name}}"; done')
    own = {"NCCL_DEBUG": "INFO", "NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "eth0", "TMPDIR": "/tmp/x y"}
    only = ["PATH", "DS_CMLI_PYTHON", "SLURM_CONF", *own]
    job = cluster.submit("--ntasks=2", f"--export={','.join(only)}", SCRIPT, cwd=tmp_path, DS_CMLI_PYTHON=python, **own)
    text = finish(cluster, tmp_path, job)
    for rank in range(2):
        start = f"rank {rank}: "
        given = dict(line.removeprefix(start).split("=") for line in text.split("\n") if line.startswith(start))
        assert given.pop("PYTHONFAULTHANDLER") == "1"
        assert given.pop("TRITON_CACHE_DIR").startswith("/tmp/x y/ds-cmli-triton-")
        assert given == {name: own[name] for name in given} and len(given) == 3


MEETS = """
import os
from ds_cmli.distributed import process_group as distributed
distributed.init()
print("step", os.environ["SLURM_STEP_ID"], distributed.gather_objects(os.environ["SLURM_STEP_ID"]), flush=True)
distributed.shutdown()
"""


def test_two_steps_of_one_allocation_do_not_meet(cluster, tmp_path):
    (tmp_path / "meets.py").write_text(MEETS)
    step = f"srun --ntasks=2 --overlap {sys.executable} {tmp_path}/meets.py"
    env = {"PYTHONPATH": str(ROOT), "MASTER_ADDR": cluster.address, "OMP_NUM_THREADS": "1"}
    job = cluster.submit("--nodes=2", "--ntasks=2", f"--wrap={step} & {step} & wait", cwd=tmp_path, **env)
    text = finish(cluster, tmp_path, job, timeout=90)
    for number in "01":
        assert text.count(f"step {number} ['{number}', '{number}']") == 2, text


def test_a_job_is_told_before_its_time_limit(cluster, limited):
    folder, job = limited
    text = finish(cluster, folder, job, timeout=240)
    assert "told by TERM" in text and "went on" in text, text
    assert "preempted (exit code 85)" in text and f"job {job}: requeued\n" in text
