#!/usr/bin/env bash
# Run an ablation on Slurm: sbatch --array=0-7 [sbatch options] slurm/ablate.sh PLAN.toml [options of profiling/ablate.py]
# Each task of the array trains its share of the plan's runs, one after another, on one GPU or on the task's CPUs.
#SBATCH --job-name=ds-cmli-ablate
#SBATCH --ntasks=1
#SBATCH --time=24:00:00
# A preempted task starts again under the same id and goes on in the same log.
#SBATCH --requeue
#SBATCH --open-mode=append
# Ninety seconds before the time limit the run in progress gets a signal that tells it to save.
#SBATCH --signal=TERM@90
set -uo pipefail

PREEMPTED=85 # exit code of profiling/ablate.py: a run has saved, to be continued

die() {
    echo "error: $*" >&2
    exit 2
}
[[ -n ${SLURM_JOB_ID:-} ]] || die "this is a job script: start it with sbatch --array=0-7 slurm/ablate.sh PLAN.toml"

# --- signals that only this shell gets are passed on to the task, as USR1 because srun would obey a TERM itself
step=
for name in TERM USR1 USR2 INT QUIT HUP; do
    trap '[[ -z $step ]] || kill -USR1 "$step" 2>/dev/null' "$name"
done

# --- where things are: sbatch runs a copy from its spool folder, so Slurm is asked for the original's path
job_field() { scontrol show job "$SLURM_JOB_ID" | sed -n "s/^.* $1=\([^ ]*\).*/\1/p" | head -n 1; }
script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p' | head -n 1)
while [[ ! -f $script && $script == *" "* ]]; do script=${script% *}; done
for project in "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." "$(dirname "$(readlink -f "$script")")/.." \
    "${SLURM_SUBMIT_DIR:-.}"; do
    [[ -f $project/profiling/ablate.py ]] && break
done
[[ -f $project/profiling/ablate.py ]] ||
    die "no profiling/ablate.py beside $script or in ${SLURM_SUBMIT_DIR:-.}: submit slurm/ablate.sh from the project's folder"

# --- Python, as in train.sh: DS_CMLI_PYTHON, or that of an active environment, or that of the project's .venv
if [[ -n ${DS_CMLI_SETUP:-} ]]; then
    set +u # the scripts of modules and conda use variables that are not set
    eval "$DS_CMLI_SETUP" || die "DS_CMLI_SETUP failed: $DS_CMLI_SETUP"
    set -u
fi
if [[ -z ${DS_CMLI_PYTHON:-} && -z ${VIRTUAL_ENV:-} && -x $project/.venv/bin/python ]]; then
    DS_CMLI_PYTHON=$project/.venv/bin/python
fi
python=("${DS_CMLI_PYTHON:-python3}")
command -v "${python[0]}" >/dev/null || read -ra python <<<"${python[0]}" # one program, or several words

# --- the task's share of the runs, whatever numbers the array begins with and counts by
share=()
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    number=$(((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN) / ${SLURM_ARRAY_TASK_STEP:-1}))
    share=(--task "$number" --tasks "$SLURM_ARRAY_TASK_COUNT")
fi
export DS_CMLI_GOES_ON=1 # this script says how the run goes on
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_ON_NODE:-1}}"
srun --ntasks=1 "${python[@]}" "$project/profiling/ablate.py" "$@" ${share[@]+"${share[@]}"} &
step=$!
while kill -0 "$step" 2>/dev/null; do wait "$step"; done # a signal ends `wait`, which is then called again
wait "$step"
code=$?

# --- a job in another state than RUNNING was cancelled, or Slurm requeues it
if ((code == PREEMPTED)) && [[ $(job_field JobState) == RUNNING || $(job_field Reason) == TimeLimit ]]; then
    echo "job $SLURM_JOB_ID: stopped, requeued to go on"
    trap '' TERM
    scontrol requeue "$SLURM_JOB_ID" || echo "job $SLURM_JOB_ID: not requeued: submit it again to go on"
fi
exit "$code"
