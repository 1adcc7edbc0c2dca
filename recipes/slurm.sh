#!/usr/bin/env bash
# m2m select over several machines, as a Slurm job. The run folder must be on a file system that all of them share.
#
#   sbatch --nodes=2 recipes/slurm.sh --config x.yaml
#   sbatch --nodes=4 recipes/slurm.sh --config x.yaml --accelerate_config fsdp2
#
# A job that ends before the run does (time limit, preemption) loses at most the work in flight: submit it again.
#SBATCH --job-name=m2m
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@60
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail

case " $* " in
*" --accelerate_config"*) ;;
*) set -- "$@" --accelerate_config multi_gpu ;;
esac

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
processes=$((SLURM_JOB_NUM_NODES * ${SLURM_GPUS_ON_NODE:-1}))
port=$((20000 + SLURM_JOB_ID % 20000)) # another one for every job

# One launcher on every machine; it starts the machine's processes.
srun --kill-on-bad-exit=1 bash -c '
  exec m2m select "$@" --num_machines "$SLURM_JOB_NUM_NODES" --machine_rank "$SLURM_NODEID"
' m2m "$@" --num_processes "$processes" --main_process_ip "$first" --main_process_port "$port"
