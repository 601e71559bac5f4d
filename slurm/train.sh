#!/usr/bin/env bash
# Train on Slurm: sbatch [sbatch options] slurm/train.sh [options of ds_cmli/train.py]
# Options before the script's name override the lines below; slurm/README.md has examples.
#SBATCH --job-name=ds-cmli
#SBATCH --nodes=1
#SBATCH --time=24:00:00
# Begin when all nodes are up, not when the first one is.
#SBATCH --wait-all-nodes=1
# A preempted job, and one whose node failed, starts again under the same id and goes on in the same log.
#SBATCH --requeue
#SBATCH --open-mode=append
# Ninety seconds before the time limit every task gets a signal that tells it to save.
#SBATCH --signal=TERM@90
set -uo pipefail

PREEMPTED=85 # exit code of train.py: saved, to be continued

die() {
    echo "error: $*" >&2
    exit 2
}

# --- signals: Slurm sends most of them to the tasks. Those that only this shell gets are passed on to the tasks, as USR1
# because srun would obey a TERM itself and kill them.
step=
signalled=0
pass_on() {
    signalled=1
    [[ -z $step ]] || kill -USR1 "$step" 2>/dev/null
}
trap pass_on TERM USR1 USR2 INT
# --- where things are
[[ -n ${SLURM_JOB_ID:-} ]] || die "this is a job script: start it with sbatch [sbatch options] slurm/train.sh [options]"
for program in srun scontrol; do
    command -v "$program" >/dev/null || die "node $(hostname): no $program on PATH"
done
job_field() { scontrol show job "$SLURM_JOB_ID" | sed -n "s/^.* $1=\([^ ]*\).*/\1/p" | head -n 1; }
# sbatch runs a copy from its spool folder, so Slurm is asked for the original's path, which its arguments may follow.
script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p' | head -n 1)
while [[ ! -f $script && $script == *" "* ]]; do script=${script% *}; done
for project in "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." "$(dirname "$(readlink -f "$script")")/.." \
    "${SLURM_SUBMIT_DIR:-.}"; do
    [[ -f $project/ds_cmli/train.py ]] && break
done
[[ -f $project/ds_cmli/train.py ]] ||
    die "no ds_cmli/train.py beside $script or in ${SLURM_SUBMIT_DIR:-.}: submit slurm/train.sh from the project's folder"
project=$(cd "$project" && pwd)

# The command that starts Python: DS_CMLI_PYTHON, or that of an active environment, or that of the project's .venv.
if [[ -z ${DS_CMLI_PYTHON:-} && -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -x $project/.venv/bin/python ]]; then
    DS_CMLI_PYTHON=$project/.venv/bin/python
fi
python=("${DS_CMLI_PYTHON:-python3}")
# It is one program, whose path may hold spaces, or several words, of which those with spaces are quoted.
command -v "${python[0]}" >/dev/null || mapfile -t python < <(xargs printf '%s\n' <<<"${python[0]}")
found=$(command -v "${python[0]}") ||
    die "node $(hostname): no '${python[0]}': set DS_CMLI_PYTHON to the command that starts Python"
# Whatever DeepSpeed compiles at run time calls programs of the same environment.
export PATH="$(dirname "$found"):$PATH"

# --- the run's folder is named after the job, so that a requeued job finds what it has saved
name=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || name=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
options=("${@//%a/${SLURM_ARRAY_TASK_ID:-%a}}")
run=
for ((i = 0; i < ${#options[@]}; i++)); do
    case ${options[i]} in
    --output-dir) run=${options[i + 1]:-} ;;
    --output-dir=*) run=${options[i]#*=} ;;
    esac
done
if [[ -z $run ]]; then
    run=runs/slurm-$name
    options=(--output-dir "$run" "${options[@]}")
fi
saved_step() {
    local latest=
    [[ -f $run/checkpoint/latest ]] && latest=$(tr -dc 0-9 <"$run/checkpoint/latest")
    echo $((10#0$latest))
}
first_step=$(saved_step)
# Starts that gain no step are counted: a run that is always stopped before its first step would be requeued for ever.
most=${DS_CMLI_REQUEUE_MOST:-3}
[[ $most =~ ^[1-9][0-9]*$ ]] || die "DS_CMLI_REQUEUE_MOST is '$most': give a number from 1 on"
limit=$((${SLURM_JOB_END_TIME:-0} - ${SLURM_JOB_START_TIME:-0})) # seconds; 0 where Slurm does not tell
lead=${SBATCH_SIGNAL:-$(grep -m 1 '^#SBATCH --signal=' "${BASH_SOURCE[0]}")}
lead=${lead##*@} # Slurm does not tell what --signal on sbatch's command line has set
((limit <= 0 || 2 * lead <= limit)) ||
    echo "notice: the time limit is $limit s, and $lead s before it the run is told to stop (unless --signal says" \
        "otherwise): that is more than half of it; ask for a longer --time"
count_start() {
    local file=$run/starts-without-a-step starts=1
    if (($(saved_step) > first_step)); then
        rm -f "$file"
        return
    fi
    [[ -f $file ]] && starts=$(($(<"$file") + 1))
    if ((starts >= most)); then
        rm -f "$file"
        die "job $name: $starts starts in a row ended before they had gained a step: not requeued. Ask for a longer" \
            "--time; DS_CMLI_REQUEUE_MOST sets how many such starts are allowed"
    fi
    echo "notice: told to stop after $SECONDS s of a time limit of $limit s, before a step was gained: $starts of $most"
    mkdir -p "$run" && echo "$starts" >"$file"
}

# DS_CMLI_SNAPSHOT=1: all starts of the job run the code as it was at the first start.
if [[ ${DS_CMLI_SNAPSHOT:-0} == 1 ]]; then
    copy=$(realpath -m "$run/code")
    if [[ ! -d $copy ]]; then
        rm -rf "$copy.new"
        mkdir -p "$copy.new" && cp -r "$project"/{ds_cmli,ds_configs,slurm} "$copy.new" || die "no snapshot in $copy"
        PYTHONPATH=$project "${python[@]}" -c \
            "from ds_cmli.common.provenance import revision; print(revision() or '')" >"$copy.new/REVISION"
        mv "$copy.new" "$copy"
    fi
    project=$copy
    export PYTHONPATH="$copy${PYTHONPATH:+:$PYTHONPATH}"
fi

# --- environment variables of the tasks, unless they are set: a crash prints a traceback, each node has its own cache
export PYTHONFAULTHANDLER="${PYTHONFAULTHANDLER-1}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/ds-cmli-triton-$(id -u)}"

# --- one task per GPU; without GPUs as many as --ntasks or --ntasks-per-node say, or one per node
if [[ -z ${SLURM_CPUS_ON_NODE:-} ]]; then # within salloc, only tasks have this variable
    read -r SLURM_GPUS_ON_NODE SLURM_CPUS_ON_NODE < <(srun --nodes=1 --ntasks=1 --gpu-bind=none \
        bash -c 'echo ${SLURM_GPUS_ON_NODE:-0} $SLURM_CPUS_ON_NODE') || die "srun starts nothing in this allocation"
fi
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
# srun would read these and divide GPUs and CPUs again. Every task must see all GPUs of its node, as NCCL needs it.
unset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_NTASKS_PER_GPU SLURM_NTASKS_PER_NODE
unset SLURM_CPUS_PER_GPU SLURM_CPUS_PER_TASK
# ALL: the tasks get this script's environment even if sbatch was told to pass none to the script.
common=(--nodes="$SLURM_NNODES" --gpu-bind=none --export=ALL)
# In blocks, so that neighbouring ranks get neighbouring cores, as neighbouring GPUs belong to one socket.
share=(--cpus-per-task="$cpus" --distribution=block:block)
if ((cpus == 0)); then
    echo "notice: the $per_node tasks of a node share $SLURM_CPUS_ON_NODE CPU: ask for more with --cpus-per-gpu"
    share=(--overcommit)
fi

# Run a Slurm step to its end, and set `code` to its exit code.
finish() {
    srun "${common[@]}" "$@" &
    step=$!
    local before
    while true; do # a signal also ends `wait`, which is then called again
        before=$signalled
        signalled=0
        wait "$step"
        code=$?
        ((signalled)) || break
    done
    signalled=$((before || signalled))
    step=
}

# --- where the tasks meet: on the first node, where rank 0 runs. It is asked for here, as containers have no scontrol.
if [[ -z ${MASTER_ADDR:-} ]]; then
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # The resolver may not know the name that the node has in Slurm.
    getent hosts "$MASTER_ADDR" >/dev/null ||
        MASTER_ADDR=$(scontrol --oneliner show node "$MASTER_ADDR" | grep -o ' NodeAddr=[^ ]*' | cut -d = -f 2)
    export MASTER_ADDR
fi

# --- check every node
finish --ntasks="$SLURM_NNODES" --ntasks-per-node=1 "${python[@]}" "$project/slurm/check.py"

# --- the run. A failed task does not end the others at once, so that they can report which one failed, or save.
if ((code == 0 && !signalled)); then
    echo "job $name, start ${SLURM_RESTART_COUNT:-0}: $tasks tasks on $SLURM_NNODES nodes ($SLURM_JOB_NODELIST)," \
        "$gpus GPUs and $SLURM_CPUS_ON_NODE CPUs a node"
    output=()
    if [[ ${DS_CMLI_RANK_OUTPUT:-0} == 1 ]]; then
        mkdir -p "$run" || die "cannot write to $run"
        output=(--output="$run/rank-%t.out" --open-mode=append)
        echo "job $name: the output of each rank is in $run/rank-N.out"
    fi
    finish "${share[@]}" ${output[@]+"${output[@]}"} --ntasks="$tasks" --ntasks-per-node="$per_node" \
        --kill-on-bad-exit=0 --wait=300 "${python[@]}" "$project/ds_cmli/train.py" "${options[@]}"
elif ((code == 0)); then
    code=$PREEMPTED # the signal came before the run began
elif ((code <= 128)); then
    die "not started: see the lines above"
fi

# --- requeue the job if it was preempted. A run that a warning signal killed while it was starting has lost nothing.
case $code in
"$PREEMPTED" | $((128 + 10)) | $((128 + 12)) | $((128 + 15)))
    state=$(job_field JobState)
    echo "job $name: preempted (exit code $code), the job's state is $state"
    if [[ $(job_field BatchFlag) == 0 ]]; then
        echo "job $name: started within salloc, and so not requeued: start it again to go on"
    # A job in another state was cancelled, or Slurm requeues it itself. The exception is a time limit without a signal
    # before it, after which the job is requeued here too.
    elif [[ $state == RUNNING || $(job_field Reason) == TimeLimit ]]; then
        trap '' TERM
        count_start
        scontrol requeue "$SLURM_JOB_ID" && echo "job $name: requeued"
    fi
    ;;
esac
exit "$code"
