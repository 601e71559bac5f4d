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

program=ds_cmli/train.py
node=${SLURMD_NODENAME:-$(hostname)}
# The last task of an array has the array's own number, by which Slurm would requeue all of its tasks.
job=${SLURM_JOB_ID:-}
[[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
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
    [[ -n $step ]] || return
    # When Slurm ends the job, it tells the tasks too, and they name the signal that came first.
    [[ $1 == TERM && $(job_field JobState) =~ ^([^R]|RE) ]] || kill -USR1 "$step" 2>/dev/null
}
for name in TERM USR1 USR2 INT QUIT HUP; do trap "pass_on $name" "$name"; done
# --- where things are
set_up() { # DS_CMLI_SETUP: commands that prepare the environment, for instance "module load cuda"
    [[ -n ${DS_CMLI_SETUP:-} ]] || return 0
    set +u # the scripts of modules and conda use variables that are not set
    eval "$DS_CMLI_SETUP" || die "node $node: DS_CMLI_SETUP failed: $DS_CMLI_SETUP"
    set -u
}
words() { [[ -z $1 ]] || xargs printf '%s\n' <<<"$1"; } # split at spaces, but for words that are quoted
# The command that starts Python: DS_CMLI_PYTHON, or that of an active environment, or that of the project's .venv.
find_python() {
    if [[ -z ${DS_CMLI_PYTHON:-} && -z ${VIRTUAL_ENV:-} && -x $project/.venv/bin/python ]]; then
        # Many shells activate conda's base environment by themselves: that is no choice.
        if [[ -z ${CONDA_PREFIX:-} || ${CONDA_DEFAULT_ENV:-} == base ]]; then
            DS_CMLI_PYTHON=$project/.venv/bin/python
            [[ -z ${CONDA_PREFIX:-} ]] ||
                echo "notice: runs $DS_CMLI_PYTHON and not conda's base environment: DS_CMLI_PYTHON names another"
        fi
    fi
    python=("${DS_CMLI_PYTHON:-python3}")
    # It is one program, whose path may hold spaces, or several words.
    command -v "${python[0]}" >/dev/null || mapfile -t python < <(words "${python[0]}")
}
[[ -n ${SLURM_JOB_ID:-} ]] || die "this is a job script: start it with sbatch [sbatch options] slurm/train.sh [options]"
for needed in srun scontrol; do
    command -v "$needed" >/dev/null || die "node $node: no $needed on PATH"
done
((${SLURM_HET_SIZE:-1} == 1)) ||
    die "this is a heterogeneous job (\" : \" among sbatch's options), of which only the first part would train:" \
        "ask for all nodes as one, for instance with --nodes=2 --ntasks=3"
# Only from lines that hold no text of the user's, as that of the job's name does.
job_field() {
    scontrol show job "$job" | sed -En "/^ *(JobState|Requeue|PreemptEligibleTime)=/s/^(.* )?$1=([^ ]*).*/\2/p" |
        head -n 1
}
# An option of sbatch behind the script's name would be one of the program. Some are of both.
theirs=$(sbatch --help 2>/dev/null)
for word in "$@"; do
    case $word in
    --profile | --profile=* | --help | -h | --) ;;
    --* | -[A-Za-z]*)
        name=${word%%=*}
        [[ $name == --* ]] || name=${name:0:2}
        ! grep -qE -- "^ *(-[A-Za-z], )?$name" <<<"$theirs" ||
            die "$word is an option of sbatch: sbatch options go before the script: sbatch $word ... slurm/train.sh"
        ;;
    esac
done

set_up
# sbatch runs a copy from its spool folder, so Slurm gives the original's path, which its arguments may follow.
given=$(scontrol show job "$job" | sed -n 's/^ *Command=//p' | head -n 1)
script=$given
while [[ ! -f $script && $script == *" "* ]]; do script=${script% *}; done
for project in "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." "$(dirname "$(readlink -f "$script")")/.." \
    "${SLURM_SUBMIT_DIR:-.}"; do
    [[ -f $project/$program ]] && break
done
if [[ ! -f $project/$program ]]; then
    [[ $given != "(null)" ]] ||
        die "the script was read from standard input, which does not say where the project is: sbatch slurm/train.sh," \
            "or submit from the project's folder and not from ${SLURM_SUBMIT_DIR:-.}"
    [[ -f $script ]] ||
        die "node $node: there is no $given here: the project must be visible from all nodes"
    die "no $program next to $script or in ${SLURM_SUBMIT_DIR:-.}: submit slurm/train.sh from the project's folder"
fi
project=$(cd "$project" && pwd)

mapfile -t extra < <(words "${DS_CMLI_SRUN:-}") # options of srun, for instance of a container
find_python
if [[ " ${extra[*]-}" != *" --container"* ]]; then # otherwise the program is in the container
    found=$(command -v "${python[0]}") ||
        die "node $node: no '${python[0]}': set DS_CMLI_PYTHON to the command that starts Python"
    # Whatever DeepSpeed compiles at run time calls programs of the same environment.
    export PATH="$(dirname "$found"):$PATH"
fi

# --- the run's folder is named after the job, so that a requeued job finds what it has saved
options=("${@//%a/${SLURM_ARRAY_TASK_ID:-%a}}")
run=
for ((i = 0; i < ${#options[@]}; i++)); do
    case ${options[i]} in
    --output-dir) run=${options[i + 1]:-} ;;
    --output-dir=*) run=${options[i]#*=} ;;
    esac
done
if [[ -z $run ]]; then
    run=runs/slurm-$job
    options=(--output-dir "$run" ${options[@]+"${options[@]}"})
fi
# What to type where the job is not requeued.
[[ -f $script ]] || script=$project/slurm/train.sh
go_on="to go on, in $PWD: sbatch [sbatch options]$(printf ' %q' "$script" "${options[@]}")"
saved_steps() { echo $((10#0$(cat "$run/checkpoint/latest" 2>/dev/null | tr -dc 0-9))); }
first_step=$(saved_steps)
# Starts that gain no step are counted: a run that is always stopped before its first step would be requeued for ever.
most=${DS_CMLI_REQUEUE_MOST:-3}
[[ $most =~ ^[1-9][0-9]*$ ]] || die "DS_CMLI_REQUEUE_MOST is '$most': give a number from 1 on"
limit=$((${SLURM_JOB_END_TIME:-0} - ${SLURM_JOB_START_TIME:-0})) # seconds; 0 where Slurm does not tell
lead=${SBATCH_SIGNAL:-$(grep -m 1 '^#SBATCH --signal=' "$0")}
# Slurm does not tell what --signal on sbatch's command line has set. Without a time it is a minute.
if [[ $lead =~ @([0-9]+)$ ]]; then lead=$((10#${BASH_REMATCH[1]})); else lead=60; fi
((limit <= 0 || 2 * lead <= limit)) ||
    echo "notice: the time limit is $limit s, and $lead s before it the run gets its signal (unless --signal says" \
        "otherwise): that is more than half of it; ask for a longer --time"
file=$run/starts-without-a-step
count_start() {
    (($(saved_steps) > first_step)) && rm -f "$file" && return
    local starts=$((10#0$(cat "$file" 2>/dev/null | tr -dc 0-9) + 1))
    # Where nothing can be written, so that no start gains anything, Slurm's own count takes its place.
    { mkdir -p "$run" && echo "$starts" >"$file"; } || starts=$((${SLURM_RESTART_COUNT:-0} + 1))
    if ((starts >= most)); then
        rm -f "$file"
        die "job $job: $starts starts in a row ended before they had gained a step: not requeued. If by the time limit," \
            "ask for a longer --time; DS_CMLI_REQUEUE_MOST sets how many such starts are allowed"
    fi
    echo "notice: ended after $SECONDS s of a time limit of $limit s, before a step was gained: $starts of $most"
}

# --- environment variables of the tasks, unless they are set: a crash prints a traceback, each node has its own cache
export DS_CMLI_GOES_ON=1 # this script says how the run goes on, so that its ranks need not
export PYTHONFAULTHANDLER="${PYTHONFAULTHANDLER-1}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/ds-cmli-triton-$(id -u)}"

# --- one task per GPU; without GPUs as many as --ntasks or --ntasks-per-node say, or one per node
if [[ -z ${SLURM_CPUS_ON_NODE:-} ]]; then # within salloc, only tasks have this variable
    read -r SLURM_GPUS_ON_NODE SLURM_CPUS_ON_NODE < <(srun --nodes=1 --ntasks=1 --gpu-bind=none \
        bash -c 'echo ${SLURM_GPUS_ON_NODE:-0} $SLURM_CPUS_ON_NODE') || die "srun starts nothing in this allocation"
fi
each() { # "3,1(x2)", as Slurm writes what each node has, to "3 1 1 "
    local part times
    for part in ${1//,/ }; do
        times=1
        [[ $part != *"(x"* ]] || times=$(tr -dc 0-9 <<<"${part#*(x}")
        printf "${part%(*} %.0s" $(seq "$times")
    done
}
gpus=${SLURM_GPUS_ON_NODE:-0}
if ((gpus > 0)); then
    tasks=$((gpus * SLURM_NNODES))
    # Lines "Nodes=n[1-2] ... GRES=gpu:a100:2(IDX:0,3),gpu:h100:1(IDX:2)", one for nodes that have the same.
    numbers=$(scontrol show job -d "$job" | awk -F "GRES=" '/^ *Nodes=/ {
        sum = 0
        for (i = split($2, gres, ","); i > 0; i--)
            if (gres[i] ~ /^gpu/) { sub(/[(].*/, "", gres[i]); sub(/.*:/, "", gres[i]); sum += gres[i] }
        print sum }' | sort -u | wc -l)
    ((numbers < 2)) ||
        die "${SLURM_GPUS:+$SLURM_GPUS }GPUs on $SLURM_NNODES nodes are not the same number on each: ask with" \
            "--gpus-per-node"
    on_nodes="$gpus(x$SLURM_NNODES)"
elif [[ -n ${SLURM_NTASKS:-} ]]; then
    tasks=$SLURM_NTASKS
    on_nodes=$SLURM_TASKS_PER_NODE
else
    tasks=$SLURM_NNODES
    on_nodes="1(x$SLURM_NNODES)"
fi
read -ra tasks_of <<<"$(each "$on_nodes")"
read -ra cpus_of <<<"$(each "${SLURM_JOB_CPUS_PER_NODE:-$SLURM_CPUS_ON_NODE(x$SLURM_NNODES)}")"
per_node=0               # the most tasks that a node has
cpus=$SLURM_CPUS_ON_NODE # of each task: the same number on all nodes
for i in "${!tasks_of[@]}"; do
    ((tasks_of[i] <= per_node)) || per_node=${tasks_of[i]}
    ((cpus_of[i] / tasks_of[i] >= cpus)) || cpus=$((cpus_of[i] / tasks_of[i]))
done
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cpus > 0 ? cpus : 1))}"
# srun would read these and divide GPUs and CPUs again. Every task must see all GPUs of its node, as NCCL needs it.
unset SLURM_GPUS SLURM_GPUS_PER_NODE SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_TRES_BIND
unset SLURM_NTASKS_PER_GPU SLURM_NTASKS_PER_NODE SLURM_CPUS_PER_GPU SLURM_CPUS_PER_TASK
# ALL: the tasks get this script's environment even if sbatch passes none to the script.
common=(--nodes="$SLURM_NNODES" --gpu-bind=none --export=ALL)
((gpus == 0)) || common+=(--gpus-per-node="$gpus")
# In blocks, so that neighbouring ranks get neighbouring cores, as neighbouring GPUs belong to one socket.
cores=(--cpus-per-task="$cpus" --distribution=block:block)
if ((cpus == 0)); then
    echo "notice: the $per_node tasks of a node have no CPU each: ask for more with --cpus-per-gpu or --cpus-per-task"
    cores=(--overcommit)
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

silent= # a node of the job that does not answer
look_for_silent_node() {
    local answer
    ((SLURM_NNODES > 1)) && [[ -z $silent && $(job_field JobState) == RUNNING ]] || return
    answer=$(timeout 120 srun "${common[@]}" --overlap --ntasks="$SLURM_NNODES" --ntasks-per-node=1 true 2>&1) ||
        silent=$(grep -m 1 -o 'node [^ :]*' <<<"$answer" || echo "a node")
}

# Python's environment may have the package of another checkout installed.
export PYTHONPATH="$project${PYTHONPATH:+:$PYTHONPATH}"

# --- where the tasks meet: on the first node, where rank 0 runs. It is read here, as containers have no scontrol.
if [[ -z ${MASTER_ADDR:-} ]]; then
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # The resolver may not know the name that the node has in Slurm.
    getent hosts "$MASTER_ADDR" >/dev/null ||
        MASTER_ADDR=$(scontrol --oneliner show node "$MASTER_ADDR" | grep -o ' NodeAddr=[^ ]*' | cut -d = -f 2)
    export MASTER_ADDR
fi

# --- check every node
project_here='[[ -e $0 ]] || { echo "error: node $SLURMD_NODENAME: there is no $0 here: the project must be visible'
project_here+=' from all nodes" >&2; exit 1; }; exec "$@"'
one_each=(--ntasks="$SLURM_NNODES" --ntasks-per-node=1 ${extra[@]+"${extra[@]}"})
finish "${one_each[@]}" bash -c "$project_here" "$project/slurm/check.py" "${python[@]}" "$project/slurm/check.py"
((code || signalled || SLURM_NNODES == 1)) || finish "${one_each[@]}" "${python[@]}" "$project/slurm/check.py" network

# --- the run. A failed task does not end the others at once, so that they can report which one failed, or save.
if ((code == 0 && !signalled)); then
    where=$SLURM_JOB_NODELIST
    [[ $on_nodes != *,* ]] || where+=": $on_nodes"
    echo "job $job, start ${SLURM_RESTART_COUNT:-0}: $tasks tasks on $SLURM_NNODES nodes ($where)," \
        "$gpus GPUs and $SLURM_CPUS_ON_NODE CPUs a node; code of $project"
    finish "${cores[@]}" --ntasks="$tasks" --ntasks-per-node="$per_node" --kill-on-bad-exit=0 --wait=300 \
        ${extra[@]+"${extra[@]}"} \
        "${python[@]}" "$project/$program" "${options[@]}"
elif ((code == 0)); then
    code=$PREEMPTED # the signal came before the run began
elif ((code <= 128)); then
    look_for_silent_node
    [[ -n $silent ]] || die "not started: see the lines above"
fi

# --- requeue the job if it was preempted, or has lost a node. A run that a signal killed while it was starting has lost
# nothing; one that srun killed, as --full tells it to, goes on from its last checkpoint.
why=
if ((code == 0 || code == 2)) && [[ -z $silent ]]; then
    rm -f "$file"
    # Slurm itself would start a job that ends in the grace time of its preemption once more.
    [[ $(job_field PreemptTime) =~ ^(None)?$ ]] || scontrol update jobid="$job" requeue=0
elif ((code == PREEMPTED || code == 128 + 10 || code == 128 + 12 || code == 128 + 15)); then
    why="preempted (exit code $code)"
elif ((signalled)); then
    why="told to stop, and ended before it had saved (exit code $code)"
else
    look_for_silent_node
    [[ -z $silent ]] || why="$silent does not answer (exit code $code)"
    # 253 and 125: Slurm's number of a task that had no memory left, as a signal.
    [[ -n $why || ! $code =~ ^(137|253|125)$ ]] ||
        echo "error: a task was killed (exit code $code), as happens where a node's or the job's memory does not" \
            "suffice: ask for more with --mem or --mem-per-gpu" >&2
fi
failed=$(job_field FailedNode)
[[ -z $why || -z $failed ]] || why="node $failed has failed (exit code $code)"
if [[ -n $why ]]; then
    state=$(job_field JobState)
    echo "job $job: $why, the job's state is $state"
    if [[ $(job_field BatchFlag) == 0 ]]; then
        echo "job $job: started within salloc, and so not requeued: start it again to go on"
    elif ((10#0$(job_field Restarts) > ${SLURM_RESTART_COUNT:-0})); then
        echo "job $job: requeued by Slurm"
    # A job in another state was cancelled. The exception is a time limit without a signal before it.
    elif [[ $state == RUNNING || $(job_field Reason) == TimeLimit ]]; then
        trap '' TERM
        count_start
        if refusal=$(scontrol requeue "$job" 2>&1); then
            echo "job $job: requeued"
        else
            echo "job $job: not requeued ($refusal): $go_on"
        fi
    else
        echo "job $job: cancelled: $go_on"
    fi
fi
exit "$code"
