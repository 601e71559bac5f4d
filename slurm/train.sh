#!/usr/bin/env bash
# Train on Slurm: sbatch [sbatch options] slurm/train.sh [options of ds_cmli/train.py], from the project's folder.
# It starts one task per GPU; without GPUs it starts --ntasks-per-node tasks on each node.
# In the options of train.py %a stands for the number of the array task.
#SBATCH --job-name=ds-cmli
#SBATCH --nodes=1
#SBATCH --time=24:00:00
# Begin when all nodes are up, not when the first one is.
#SBATCH --wait-all-nodes=1
# A preempted job, and one whose node failed, starts again under the same id and goes on in the same log.
#SBATCH --requeue
#SBATCH --open-mode=append
# Ninety seconds before the time limit every task gets a signal, saves and ends with exit code 85.
#SBATCH --signal=TERM@90
set -uo pipefail
die() {
    echo "error: $*" >&2
    exit 2
}

[[ -n ${SLURM_JOB_ID:-} ]] || die "this is a job script: sbatch [sbatch options] slurm/train.sh [options]"
cd "${SLURM_SUBMIT_DIR:-.}" && [[ -f ds_cmli/train.py ]] || die "submit slurm/train.sh from the project's folder"
set +u # the scripts of modules and conda use variables that are not set
# Commands that prepare the environment, for instance "module load cuda; source .venv/bin/activate".
eval "${DS_CMLI_SETUP:-}" || die "DS_CMLI_SETUP failed: $DS_CMLI_SETUP"
set -u
read -ra python <<<"${DS_CMLI_PYTHON:-python3}" # may be several words: "apptainer exec --nv cmli.sif python"
read -ra srun_options <<<"${DS_CMLI_SRUN:-}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONFAULTHANDLER="${PYTHONFAULTHANDLER-1}"

# SLURM_JOB_ID of the last task of an array is the array's own number: scontrol would requeue all tasks of the array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
# The run's folder is named after the job, so that a requeued job finds what it has saved.
options=("${@//%a/${SLURM_ARRAY_TASK_ID:-%a}}")
folder=
for ((i = 0; i < ${#options[@]}; i++)); do
    case ${options[i]} in
    --output-dir) folder=${options[i + 1]-} ;;
    --output-dir=*) folder=${options[i]#*=} ;;
    esac
done
if [[ -z $folder ]]; then
    folder="runs/slurm-$job"
    options=(--output-dir "$folder" ${options[@]+"${options[@]}"})
fi

# Each node runs the same number of tasks, and each task gets the same number of CPUs.
gpus=${SLURM_GPUS_ON_NODE:-0}
tasks=$((gpus > 0 ? gpus : ${SLURM_NTASKS_PER_NODE:-1}))
((SLURM_CPUS_ON_NODE >= tasks)) ||
    die "job $job has $SLURM_CPUS_ON_NODE CPUs for $tasks tasks on a node: give sbatch --cpus-per-gpu=8, or --cpus-per-task=8"
cpus=$((SLURM_CPUS_ON_NODE / tasks))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$cpus}"
# Tasks get CPUs in blocks: neighbouring ranks get neighbouring cores, because neighbouring GPUs share a socket.
step_options=(--nodes="$SLURM_NNODES" --ntasks-per-node="$tasks" --cpus-per-task="$cpus" --distribution=block:block)
((gpus == 0)) || step_options+=(--gpus-per-node="$gpus" --gpu-bind=none) # every task sees all GPUs of its node, for NCCL
# export: the tasks get this script's environment, even if sbatch passed none to the script.
# kill-on-bad-exit: a failed task does not end the others at once. They need up to 70 seconds to name a rank that is dead or
# stopped, and Slurm needs time to notice a failed node.
# wait: srun kills the tasks that still run 100 seconds after the first one has ended, such as a stopped one.
step_options+=(--export=ALL --kill-on-bad-exit=0 --wait=100)
ulimit -S -n "$(ulimit -H -n)" # Sockets between ranks, files and loading processes need many descriptors.
# srun would read these and divide GPUs and CPUs again.
unset SLURM_GPUS SLURM_GPUS_PER_NODE SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_TRES_BIND \
    SLURM_NTASKS SLURM_NTASKS_PER_GPU SLURM_NTASKS_PER_NODE SLURM_CPUS_PER_GPU SLURM_CPUS_PER_TASK
# The tasks meet on the first node, where rank 0 runs. Its address is read here, because containers have no scontrol.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol --oneliner show node "$first_node" | grep -o ' NodeAddr=[^ ]*')
export MASTER_ADDR="${MASTER_ADDR:-${address#*=}}"

echo "job $job, start ${SLURM_RESTART_COUNT:-0}: $tasks tasks on each of $SLURM_NNODES nodes ($SLURM_JOB_NODELIST)"
if ((${SLURM_RESTART_COUNT:-0} > 0)) && [[ ! -e $folder/checkpoint/latest ]]; then
    echo "job $job: $folder has no checkpoint of an earlier start, so the training begins at step 0"
fi
# Slurm signals the tasks. When it ends the job it signals this shell too, which goes on to wait for them.
for name in TERM USR1 USR2 INT HUP; do trap : "$name"; done
srun "${step_options[@]}" ${srun_options[@]+"${srun_options[@]}"} "${python[@]}" ds_cmli/train.py "${options[@]}"
code=$?

# 85: the run is saved and to be continued. 138 and 143 (128 + USR1 or TERM): it was stopped before its first step.
if [[ $code =~ ^(85|138|143)$ ]]; then
    job_record=$(scontrol --oneliner show job "$job")
    # Slurm sends SIGCONT before the signal of the time limit, and the job is SIGNALING until every node has answered: a
    # quick save can end before that. A job in another state was cancelled, or Slurm requeues it itself.
    if [[ ! $job_record =~ \ JobState=(RUNNING|SIGNALING)\  ]]; then
        exit "$code"
    elif [[ $job_record =~ \ PreemptTime=[0-9] ]]; then # If this script requeued it too, it would start twice.
        echo "job $job: preempted, to be requeued by Slurm"
    elif [[ $job_record =~ \ Requeue=0\  ]]; then
        die "job $job: saved and not requeued, which --no-requeue or the site forbids: submit it again with --output-dir $folder"
    elif ((${SLURM_RESTART_COUNT:-0} >= ${DS_CMLI_REQUEUE_MOST:-100})); then
        die "job $job: not requeued after ${SLURM_RESTART_COUNT:-0} restarts, of which DS_CMLI_REQUEUE_MOST sets the number"
    else
        echo "job $job: to be requeued" # Requeueing ends this script.
        scontrol requeue "$job"
    fi
elif ((code == 86 || code == 137)); then # 137: srun has killed a task, for instance a stopped one.
    echo "error: job $job: a rank held the others up or was lost, as a line above says: not requeued" >&2
fi
exit "$code"
