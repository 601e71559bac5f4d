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
# All the rest is that of train.sh. It is next to the original of this file, of which sbatch runs a copy.
set -uo pipefail
signalled=0
for name in TERM USR1 USR2 INT QUIT HUP; do trap 'signalled=1' "$name"; done
script=$(scontrol show job "${SLURM_JOB_ID:-}" 2>/dev/null | sed -n 's/^ *Command=//p' | head -n 1)
while [[ ! -f $script && $script == *" "* ]]; do script=${script% *}; done
for folder in "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" "$(dirname "$(readlink -f "$script")")" \
    "${SLURM_SUBMIT_DIR:-.}/slurm"; do
    [[ -f $folder/train.sh ]] && break
done
if [[ ! -f $folder/train.sh ]]; then
    echo "error: no train.sh next to $script or in ${SLURM_SUBMIT_DIR:-.}/slurm: submit slurm/ablate.sh from the project's" \
        "folder, which must be visible from all nodes" >&2
    exit 2
fi
. "$folder/train.sh"
