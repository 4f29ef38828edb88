#!/usr/bin/env bash
# Workers of a study as a Slurm array. Begin the study first, where a process may run for long:
#
#   export DIGITLAB_STORAGE=postgresql+psycopg://digitlab@db.example.org/optuna
#   export MLFLOW_TRACKING_URI=https://mlflow.example.org
#   digitlab sweep launcher=external
#
# then, from the checkout, with the same two variables:
#
#   STUDY=default sbatch experiments/cluster/slurm.sh
#
# Passwords are read from ~/.pgpass and from the lab's .env; none is passed to sbatch, which keeps
# what it is passed.

#SBATCH --job-name=digitlab
# Sixteen at a time. Those that come when no trials are left end at once, so the number may be large:
# it says how often a worker whose time is over is followed by another.
#SBATCH --array=1-64%16
#SBATCH --ntasks=1
# As many as trainer.threads.
#SBATCH --cpus-per-task=1
#SBATCH --mem-per-cpu=3G
#SBATCH --time=04:00:00
# A minute before the time is over, to the worker itself: it ends at its next batch and puts its trial
# back, for any other worker.
#SBATCH --signal=TERM@60
# After the loss of a node, elsewhere.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=digitlab-%A-%a.log

set -euo pipefail

: "${STUDY:?is not set: name the study, STUDY=default sbatch experiments/cluster/slurm.sh}"
: "${DIGITLAB_STORAGE:?is not set: postgresql+psycopg://user@host/database, without a password}"

# Slurm runs a copy of this file, so that its own place tells nothing.
cd "${SLURM_SUBMIT_DIR:?is not set: submit this file with sbatch}"
PATH="$PWD/.venv/bin:$PATH"

# Libraries that count the machine's cores must not start a thread for each.
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
export OPENBLAS_NUM_THREADS=1

# srun does not take --cpus-per-task over from sbatch.
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" digitlab worker "$STUDY"
