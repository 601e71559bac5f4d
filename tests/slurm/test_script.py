"""slurm/train.sh between stubs of Slurm's commands: what it starts, and which ends it requeues."""

import os
import subprocess

import pytest

from tests.ranks import ROOT

# Each stub adds its command line to a file. The first srun of a job ends with $CODE.
STUB = """\
#!/bin/bash
echo "${0##*/} $*" >>"$CALLS"
case "${0##*/} $*" in
srun*) echo "$MASTER_ADDR $OMP_NUM_THREADS ${SLURM_NTASKS_PER_NODE-unset} $FLAVOUR"; exit $CODE ;;
*hostnames*) echo n1; echo n2 ;;
*"show node n1") echo "NodeName=n1 CPUTot=8 NodeAddr=10.0.0.7 NodeHostName=h" ;;
*"show job"*) echo "JobId=7 JobState=$STATE $ABOUT Reason=None" ;;
esac
"""
JOB = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_CPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "n[1-2]"}
ARRAY = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.fixture
def script(tmp_path):
    """A function that runs the script: exit code, output, and the commands that it has called."""
    for name in ("srun", "scontrol"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)

    def run(*options: str, code: int = 0, state: str = "RUNNING", **env: str) -> tuple[int, str, list[str]]:
        calls = tmp_path / "calls"
        calls.write_text("")
        stubs = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "CODE": str(code), "STATE": state}
        environment = stubs | {"ABOUT": "Requeue=1", "SLURM_SUBMIT_DIR": str(ROOT), **JOB, **env}
        command = ["bash", str(ROOT / "slurm" / "train.sh"), *options]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()

    return run


def started(calls: list[str]) -> str:
    [step] = [call for call in calls if call.startswith("srun ")]
    return step


def test_one_task_for_each_gpu_and_those_that_are_asked_for_without(script):
    code, output, calls = script("--seed", "1", "a b", SLURM_GPUS_ON_NODE="4", SLURM_NTASKS_PER_NODE="9")
    assert code == 0 and "10.0.0.7 2 unset \n" in output
    assert "--nodes=2 --ntasks-per-node=4 --cpus-per-task=2 " in started(calls)
    assert "--gpus-per-node=4 --gpu-bind=none" in started(calls)
    assert started(calls).endswith("python3 ds_cmli/train.py --output-dir runs/slurm-7 --seed 1 a b")
    _, output, calls = script("--seed=%a", SLURM_NTASKS_PER_NODE="3", MASTER_ADDR="own", **ARRAY)
    assert "own 2 unset \n" in output and "--ntasks-per-node=3 " in started(calls) and "gpu" not in started(calls)
    assert started(calls).endswith("train.py --output-dir runs/slurm-7_3 --seed=3")


def test_setup_python_and_options_of_srun(script):
    env = {"DS_CMLI_SETUP": "echo $NEVER_SET; export FLAVOUR=set", "DS_CMLI_PYTHON": "apptainer exec --nv x.sif python"}
    _, output, calls = script("--output-dir=x", DS_CMLI_SRUN="--label --mem=0", **env)
    assert "8 unset set\n" in output
    words = " --label --mem=0 apptainer exec --nv x.sif python ds_cmli/train.py --output-dir=x"
    assert started(calls).endswith(words)


ENDS = [  # srun's exit code, the job's state, and whether the script requeues it
    (85, "RUNNING", True), (143, "RUNNING", True), (138, "RUNNING", True), (85, "SIGNALING", True),
    (85, "COMPLETING", False), (85, "CANCELLED", False), (0, "RUNNING", False), (2, "RUNNING", False),
    (1, "RUNNING", False), (86, "RUNNING", False), (85, "RUNNING PreemptTime=2026-12-02T10:13:54", False),
]  # fmt: skip


@pytest.mark.parametrize("code, state, again", ENDS)
def test_what_is_requeued(script, code, state, again):
    for env, job in (({}, "7"), (ARRAY, "7_3")):
        ended, output, calls = script(code=code, state=state, DS_CMLI_REQUEUE_MOST="3", SLURM_RESTART_COUNT="2", **env)
        assert ended == code
        assert (f"scontrol requeue {job}" in calls) == again == (f"job {job}: to be requeued\n" in output)
        assert "the training begins at step 0" in output


@pytest.mark.parametrize(
    "env, words",
    [
        ({"SLURM_JOB_ID": ""}, "sbatch"),
        ({"SLURM_SUBMIT_DIR": "/"}, "from the project's folder"),
        ({"DS_CMLI_SETUP": "false"}, "DS_CMLI_SETUP"),
        ({"SLURM_GPUS_ON_NODE": "9"}, "8 CPUs for 9 tasks on a node: give sbatch --cpus-per-gpu=8"),
        ({"ABOUT": "Requeue=0"}, "saved and not requeued"),
        ({"DS_CMLI_REQUEUE_MOST": "3", "SLURM_RESTART_COUNT": "3"}, "DS_CMLI_REQUEUE_MOST"),
    ],
)
def test_mistakes_and_the_requeue_limit_are_one_line(script, env, words):
    code, output, calls = script(code=85, **env)
    error = next(line for line in output.splitlines() if line.startswith("error: "))
    assert code == 2 and words in error and not [call for call in calls if call.startswith("scontrol requeue")]
