#!/usr/bin/env bash
#SBATCH --job-name=speed-async
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=TERM@120
# One launcher per node, eight ranks each: one learner, and actors on all other GPUs.
#   sbatch --nodes 2 examples/launch/slurm.sh my.toml [--section.field value ...]
#   RESUME=runs/default sbatch --nodes 2 examples/launch/slurm.sh my.toml    continues that run
# The run drains and saves 120 s before the time limit. KEYS: folder made by `speed-async keys`.
set -euo pipefail
config="$1"
shift
hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
host="${hosts%%$'\n'*}"
options=(
  --nnodes "$SLURM_NNODES"
  --nproc-per-node "${GPUS_PER_NODE:-8}"
  --cluster.host "$host"
  --cluster.service_port "${SERVICE_PORT:-29411}"
  --cluster.keys "${KEYS:-keys}"
)
export RESUME="${RESUME:-}"
# The single quotes leave SLURM_NODEID to each node. Only the learner's node resumes.
exec srun bash -c '
  [ "$SLURM_NODEID" != 0 ] || [ -z "$RESUME" ] || set -- --resume "$RESUME" "${@:2}"
  exec speed-async train "$@" --node-rank "$SLURM_NODEID"
' speed-async "$config" "${options[@]}" "$@"
