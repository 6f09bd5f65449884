#!/usr/bin/env bash
# Train on several machines of a Slurm cluster: one torchrun on each, one process for each of its GPUs.
#
#   sbatch --nodes=2 --gpus-per-node=8 scripts/slurm.sh train_sft_diffusion_sharpening_sdxl.py FLAGS...
#
# Submit it from the root of the repository, with the project's environment active. --output_dir must lie on a disk that
# all machines share; docs/scale.md says more.
#SBATCH --job-name=sharpening
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
set -euo pipefail

[ $# -gt 0 ] || { echo "error: name the training script, then its flags" >&2; exit 2; }
main=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Slurm's GPUS_PER_NODE may read "h100:8".
gpus=${SLURM_GPUS_PER_NODE:-1}
srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${gpus##*:}" \
  --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$main:${MASTER_PORT:-29500}" "$@"
