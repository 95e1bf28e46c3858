#!/usr/bin/env bash
# Several machines without a scheduler. On each of them:  HEAD=node0 ./torchrun.sh
# The rank of a machine is found by the rendezvous at HEAD's port 29500, which all must reach.
set -euo pipefail

NODES=${NODES:-2}
GPUS=${GPUS:-8}

# Each machine holds one copy, divided among its GPUs; gradients alone go between machines.
torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" \
    --rdzv-id prefloop-sft --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" \
    -m prefloop sft --model meta-llama/Llama-3.1-8B --data /shared/data/demonstrations.jsonl \
    --output /shared/runs/sft --weights bfloat16 --gradient-checkpointing --max-length 2048 \
    --batch-size 128 --mesh "${NODES}x${GPUS}"
