"""DPO in a loop of your own: the loss and the log-probs are prefloop's, the rest is PyTorch.

    python examples/dpo_by_hand.py MODEL PAIRS.jsonl OUTPUT

PAIRS has `prompt`, `chosen`, `rejected` (or any rankings). MODEL is a folder or a hub id.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from prefloop.data.batches import TokenBatch, pack
from prefloop.data.formats import load
from prefloop.data.tokenize import tokenize
from prefloop.losses import segment_sum, sigmoid_loss
from prefloop.models.export import export_model
from prefloop.models.heads import answer_log_probs
from prefloop.models.load import load_policy, pick_device
from prefloop.records import RowCounts


def main(model: str, data: str, output: str, *, steps: int = 100, lr: float = 1e-6) -> list[float]:
    """Trains, writes the model, and returns the loss of each step."""
    policy = load_policy(model, pick_device("auto"))
    counts = RowCounts()
    rankings = load(data, "preference", counts)
    examples = tokenize(rankings, policy.tokenizer, 1024, "drop", counts)
    groups = [examples[at : at + 8] for at in range(0, len(examples), 8)]
    batches = [pack(group).to(policy.device) for group in groups]

    def log_probs(batch: TokenBatch) -> Tensor:  # log pi(answer | prompt) of all answers
        tokens = answer_log_probs(policy, batch)
        return segment_sum(tokens, batch.target_answer, batch.answers)

    with torch.no_grad():  # the reference is the model as it is now
        references = [log_probs(batch) for batch in batches]
    optimizer = torch.optim.AdamW(policy.trainable(), lr=lr)
    losses = []
    for step in range(steps):
        batch, ref = batches[step % len(batches)], references[step % len(batches)]
        winners, losers = batch.pairs()
        pi = log_probs(batch)
        total, pairs = sigmoid_loss(pi[winners], pi[losers], ref[winners], ref[losers], beta=0.1)
        (total / pairs).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item() / pairs.item())
        print(f"step {step + 1}: loss {losses[-1]:.4f}")
    export_model(policy, Path(output))
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:4])
