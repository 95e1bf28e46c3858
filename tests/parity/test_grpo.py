"""Clip-higher and Dr. GRPO's normalisation against TRL 1.16's GRPOTrainer."""

from __future__ import annotations

import pytest
import torch

from prefloop.losses import policy_loss
from tests.parity import models, plain

FIXTURE = models.read("grpo")
GIVEN = FIXTURE["given"]


@pytest.mark.parametrize("name", [name for name in FIXTURE if "grpo" in name or "clip" in name])
def test_clipped_loss_and_gradient(name: str) -> None:
    policy = models.causal_lm(models.POLICY)
    assert models.fingerprint(policy) == pytest.approx(FIXTURE["policy"], rel=1e-7)
    new, old, advantages = [], [], []
    for prompt, answer, before, advantage in zip(
        *(GIVEN[key] for key in ("prompts", "answers", "old", "advantages")), strict=True
    ):
        new.append(plain.token_log_probs(policy, prompt, answer))
        old.append(torch.tensor(before[: len(answer)]))
        advantages.append(torch.full((len(answer),), advantage))
    out = policy_loss(
        *(torch.cat(parts) for parts in (new, old, advantages)),
        cliprange=0.2,
        clip_high=FIXTURE[name]["options"].get("epsilon_high"),
    )
    constant = len(new) * GIVEN["most_tokens"]
    loss = out.sum / (constant if name.startswith("dr_grpo") else out.count)
    loss.backward()
    assert 0 < out.clipfrac_sum < out.count
    assert loss.item() == pytest.approx(FIXTURE[name]["loss"], rel=1e-5)
    assert models.grad_norm(policy) == pytest.approx(FIXTURE[name]["grad_norm"], rel=1e-5)
