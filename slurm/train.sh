#!/usr/bin/env bash
# Train on Slurm: sbatch [sbatch options] slurm/train.sh [options of ds_cmli/train.py]
# Options before the script's name override the lines below; slurm/README.md has examples.
#SBATCH --job-name=ds-cmli
#SBATCH --nodes=1
#SBATCH --time=24:00:00
# A preempted job, and one whose node failed, starts again under the same id and goes on in the same log.
#SBATCH --requeue
#SBATCH --open-mode=append
# Ninety seconds before the time limit every task is told to save.
#SBATCH --signal=TERM@90
set -uo pipefail

PREEMPTED=85 # exit code of train.py: saved, to be continued

die() {
    echo "error: $*" >&2
    exit 2
}

# --- where things are
[[ -n ${SLURM_JOB_ID:-} ]] || die "this is a job script: start it with sbatch [sbatch options] slurm/train.sh [options]"
for program in srun scontrol; do
    command -v "$program" >/dev/null || die "node $(hostname): no $program on PATH"
done
job_field() { scontrol --oneliner show job "$SLURM_JOB_ID" | grep -o " $1=[^ ]*" | head -n 1 | cut -d = -f 2-; }
# sbatch runs a copy from its spool folder: only Slurm knows where the original lies.
script=$(job_field Command)
for project in "$(dirname "${script:-.}")/.." "${SLURM_SUBMIT_DIR:-.}"; do
    [[ -f $project/ds_cmli/train.py ]] && break
done
[[ -f $project/ds_cmli/train.py ]] ||
    die "no ds_cmli/train.py beside $script or in ${SLURM_SUBMIT_DIR:-.}: submit slurm/train.sh from the project's folder"
project=$(cd "$project" && pwd)

# The command that starts Python: DS_CMLI_PYTHON, or an active environment's, or the project's .venv.
if [[ -z ${DS_CMLI_PYTHON:-} && -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -x $project/.venv/bin/python ]]; then
    DS_CMLI_PYTHON=$project/.venv/bin/python
fi
read -ra python <<<"${DS_CMLI_PYTHON:-python3}"
found=$(command -v "${python[0]}") ||
    die "node $(hostname): no '${python[0]}': set DS_CMLI_PYTHON to the command that starts Python"
# What DeepSpeed builds at run time calls programs of the same environment.
export PATH="$(dirname "$found"):$PATH"

# --- one task a GPU; without GPUs --ntasks or --ntasks-per-node, or one a node
gpus=${SLURM_GPUS_ON_NODE:-0}
if ((gpus > 0)); then
    tasks=$((gpus * SLURM_NNODES))
    asked=${SLURM_GPUS:-$tasks} # "8", or "a100:8"
    [[ ${asked##*:} == "$tasks" ]] ||
        die "$SLURM_GPUS GPUs on $SLURM_NNODES nodes are not the same number on each: ask with --gpus-per-node"
else
    tasks=${SLURM_NTASKS:-$SLURM_NNODES}
fi
per_node=$(((tasks + SLURM_NNODES - 1) / SLURM_NNODES))
cpus=$((SLURM_CPUS_ON_NODE / per_node))
# srun would read these and share out GPUs and CPUs once more. Every task sees all GPUs of its node: NCCL wants it so.
unset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_NTASKS_PER_GPU SLURM_NTASKS_PER_NODE
unset SLURM_CPUS_PER_GPU SLURM_CPUS_PER_TASK
common=(--nodes="$SLURM_NNODES" --gpu-bind=none)
share=(--cpus-per-task="$cpus")
if ((cpus == 0)); then
    echo "notice: the $per_node tasks of a node share $SLURM_CPUS_ON_NODE CPU: ask for more with --cpus-per-gpu"
    share=(--overcommit)
fi

# --- signals: most reach the tasks by Slurm. Those that come to this shell alone are passed on, as USR1: srun would take
# a TERM for itself and kill the tasks.
step=
signalled=0
pass_on() {
    signalled=1
    [[ -z $step ]] || kill -USR1 "$step" 2>/dev/null
}
trap pass_on TERM USR1 USR2

# --- where the tasks meet: on the first node, where rank 0 runs. Asked here because a container has no scontrol.
if [[ -z ${MASTER_ADDR:-} ]]; then
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # A node's name in Slurm may be none that its resolver knows.
    getent hosts "$MASTER_ADDR" >/dev/null ||
        MASTER_ADDR=$(scontrol --oneliner show node "$MASTER_ADDR" | grep -o ' NodeAddr=[^ ]*' | cut -d = -f 2)
    export MASTER_ADDR
fi

# --- what every node needs
srun "${common[@]}" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 "${python[@]}" "$project/slurm/check.py" ||
    ((signalled)) || die "not started: see the lines above"

# --- the run: its folder bears the job's name, so that a requeued job finds what it has saved
name=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || name=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
options=("${@//%a/${SLURM_ARRAY_TASK_ID:-%a}}")
echo "job $name, start ${SLURM_RESTART_COUNT:-0}: $tasks tasks on $SLURM_NNODES nodes ($SLURM_JOB_NODELIST)," \
    "$gpus GPUs and $SLURM_CPUS_ON_NODE CPUs a node"
if ((signalled)); then
    code=$PREEMPTED # before it began
else
    # One failed task does not end the others at once: they find out who failed, or save what they have.
    srun "${common[@]}" "${share[@]}" --ntasks="$tasks" --ntasks-per-node="$per_node" --kill-on-bad-exit=0 --wait=300 \
        "${python[@]}" "$project/ds_cmli/train.py" --output-dir "runs/slurm-$name" "${options[@]}" &
    step=$!
fi
# A signal also ends `wait`, which is then repeated.
while [[ -n $step ]]; do
    signalled=0
    wait "$step"
    code=$?
    ((signalled)) || break
done

# --- again, if it was preempted; killed by a warning signal while it was still starting, it has lost nothing
case $code in
"$PREEMPTED" | $((128 + 10)) | $((128 + 12)) | $((128 + 15)))
    state=$(job_field JobState)
    echo "job $name: preempted (exit code $code), the job's state is $state"
    # Where it is no longer running it was cancelled, or is being requeued by Slurm itself. Only a time limit that no
    # signal came before is left to us.
    if [[ $state == RUNNING || $(job_field Reason) == TimeLimit ]]; then
        trap '' TERM
        scontrol requeue "$SLURM_JOB_ID" && echo "job $name: requeued"
    fi
    ;;
esac
exit "$code"
