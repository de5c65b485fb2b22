#!/usr/bin/env bash
# Trains a recipe, or the stages of a folder, on the machines that Slurm gives. Submit it in the
# checkout; what stands here can be changed on sbatch's command line:
#
#   sbatch --nodes 4 scripts/slurm.sh recipes/quickstart run.seed=1
#
# Five minutes before the time is over Slurm sends USR1 to every rank: they save and leave, and the
# job queues again and goes on where it was. PYTHON names another interpreter than .venv's.
#SBATCH --job-name=mllm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u

cd "$SLURM_SUBMIT_DIR"
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun does not take it over by itself
fi
srun --kill-on-bad-exit=1 "${PYTHON:-.venv/bin/python}" -u scripts/train.py "$@"
status=$?
if [ "$status" = 130 ]; then # asked to stop, and saved
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
