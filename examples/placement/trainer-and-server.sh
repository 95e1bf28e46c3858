#!/usr/bin/env bash
# One machine: GPUs 0 to 5 train, 6 and 7 write the answers. Start it again and it goes on.
set -euo pipefail

MODEL=/shared/runs/sft
SERVERS=http://127.0.0.1:8006,http://127.0.0.1:8007

# 1. A vLLM server a GPU, each on its own port. The variable lets prefloop load new weights into them.
for gpu in 6 7; do
    CUDA_VISIBLE_DEVICES=$gpu VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server \
        --model "$MODEL/model" --logprobs-mode processed_logprobs --host 127.0.0.1 --port "800$gpu" &
done
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT

# 2. The trainers. They wait for servers that are still loading, and for one that is started again.
CUDA_VISIBLE_DEVICES=0,1,2,3,4,5 torchrun --standalone --nproc-per-node 6 \
    -m prefloop ppo --config ppo.yaml --rollout-engine "$SERVERS"
