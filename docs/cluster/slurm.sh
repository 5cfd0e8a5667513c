#!/usr/bin/env bash
# Train on several machines of a Slurm cluster. Before the time is up, and when it is preempted, the job saves,
# goes back into the queue and goes on from there.
#
#   sbatch docs/cluster/slurm.sh RECIPE RUN STORE [STORE ...]
#
# RUN and the stores lie on a file system that all machines share; the environment with micro-diffusion is active.
#SBATCH --job-name=micro-diffusion
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

recipe=$1 run=$2
shift 2
stores=()
for store in "$@"; do stores+=(--store "$store"); done
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120 # torchrun's own patience is 30 seconds, less than a save may take

again=
trap 'again=yes; scancel --signal=TERM "$SLURM_JOB_ID.0"' USR1 # the time is nearly up: every rank is asked to save
trap 'again=yes' TERM                                          # preempted: Slurm has asked the ranks itself

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    -m -- micro_diffusion train "$recipe" --run "$run" "${stores[@]}" --deadline 90 &
step=$! code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do # a trapped signal ends `wait` before the step has ended
    code=0
    wait "$step" || code=$?
done
if [[ $again && $code -ne 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
