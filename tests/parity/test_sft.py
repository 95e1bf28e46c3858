"""SFT against TRL 1.16's SFTTrainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prefloop.losses import Total, sft_loss
from tests.parity import models, plain

FIXTURE = models.read("sft")


def split(row: dict[str, list[int]]) -> tuple[list[int], list[int]]:
    """Prompt and answer of TRL's ids and labels; nothing predicts the first token."""
    answer = [label for label in row["labels"][1:] if label != -100]
    assert row["input_ids"][-len(answer) :] == answer
    return row["input_ids"][: -len(answer)], answer


@pytest.mark.parametrize("kind", ["text", "all", "chat"])
def test_loss_and_gradient(kind: str) -> None:
    trl: dict[str, Any] = FIXTURE[kind]
    model = models.causal_lm(models.POLICY)
    assert models.fingerprint(model) == pytest.approx(FIXTURE["policy"], rel=1e-7)
    parts: list[Total] = []
    for row, expected in zip(trl["tokens"], trl["rows"], strict=True):
        part = sft_loss(plain.token_log_probs(model, *split(row)))
        assert part.sum.item() / part.count.item() == pytest.approx(expected["loss"], rel=1e-5)
        parts.append(part)
    count = sum(int(part.count) for part in parts)
    loss = torch.stack([part.sum for part in parts]).sum() / count
    loss.backward()
    for step in (trl["step"], trl["step_of_3_micro_batches"]):
        assert loss.item() == pytest.approx(step["loss"], rel=1e-5)
        assert models.grad_norm(model) == pytest.approx(step["grad_norm"], rel=1e-5)
