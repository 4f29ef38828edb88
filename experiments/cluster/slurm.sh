#!/usr/bin/env bash
# A study on the nodes of one Slurm job: `ray symmetric-run` starts Ray on each of them, runs
# `digitlab sweep` on the first, and stops Ray when that ends. From the checkout:
#
#   ray get-auth-token --generate     # once: ~/.ray/auth_token, for all nodes
#   RECIPE=default sbatch experiments/cluster/slurm.sh
#
# When the time is over, submit it again: the study continues. Passwords are read from ~/.pgpass
# and from the lab's .env; none is passed to sbatch, which keeps what it is passed.

#SBATCH --job-name=digitlab
#SBATCH --nodes=4
# One Ray node on each machine.
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem-per-cpu=3G
#SBATCH --time=04:00:00
# Two minutes before the time is over: the driver stops its jobs and flushes its records.
#SBATCH --signal=TERM@120
# After the loss of the first node, elsewhere.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=digitlab-%j.log

set -euo pipefail

: "${RECIPE:?is not set: name the recipe, RECIPE=default sbatch experiments/cluster/slurm.sh}"
: "${DIGITLAB_HOME:?is not set: name a lab that all nodes see, /home/you/lab}"

# Slurm runs a copy of this file, so its own place is not the checkout.
cd "${SLURM_SUBMIT_DIR:?is not set: submit this file with sbatch}"
PATH="$PWD/.venv/bin:$PATH"

export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0
# numpy's threads; each run sets torch's own to trainer.threads.
export OPENBLAS_NUM_THREADS=1

nodes="${SLURM_JOB_NUM_NODES:-1}"
cpus="${SLURM_CPUS_PER_TASK:-1}"
# The first address of the first node: `ray symmetric-run` starts the head where it belongs.
# Read whole, since a pipe that closes early would end its writer, and this script, by SIGPIPE.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
read -r address _ < <(srun --nodes=1 --ntasks=1 --nodelist="${hosts[0]}" hostname -I)

# srun does not take --cpus-per-task from sbatch.
srun --nodes="$nodes" --ntasks="$nodes" --cpus-per-task="$cpus" \
  ray symmetric-run --address "$address:6379" --min-nodes "$nodes" --num-cpus="$cpus" -- \
  digitlab sweep "experiments=$RECIPE" launcher=ray "$@"
