#!/usr/bin/env bash
# `launch.sh` on every machine of a SLURM job. Of each 8 GPUs 7 train; the first machine's other one serves.
#
#   MODEL=Qwen/Qwen3-0.6B sbatch examples/scale_out/slurm.sh examples/scale_out/train.py \
#       --dataset trl-lib/DeepMath-103K --output_dir out --max_steps 100
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
set -euo pipefail

export MACHINES=$SLURM_NNODES
export PROCESSES=${PROCESSES:-7} TRAINER_GPUS=${TRAINER_GPUS:-1,2,3,4,5,6,7}
MAIN_IP=${MAIN_IP:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MAIN_IP

srun bash -c 'MACHINE_RANK=$SLURM_NODEID exec bash examples/scale_out/launch.sh "$@"' launch.sh "$@"
