"""Reward models against TRL 1.16's RewardTrainer."""

from __future__ import annotations

import pytest
import torch

from prefloop.losses import bradley_terry_loss, centering_loss, ranking_accuracy
from tests.parity import models, plain, rows

FIXTURE = models.read("reward")
TIERS = torch.tensor([[0, 1]] * len(rows.PAIRS))
MARGINS = torch.tensor([pair.margin for pair in rows.PAIRS]).view(-1, 1, 1)


def scored() -> tuple[torch.nn.Module, torch.Tensor]:
    """The model, and scores [P, 2] of chosen and rejected."""
    model = models.scorer(models.SCORER)
    assert models.fingerprint(model) == pytest.approx(FIXTURE["scorer"], rel=1e-7)
    pairs = [
        torch.stack(
            [plain.score(model, row["chosen_ids"]), plain.score(model, row["rejected_ids"])]
        )
        for row in FIXTURE["tokens"]
    ]
    return model, torch.stack(pairs)


@pytest.mark.parametrize("name", ["plain", "margin"])
def test_loss_gradient_and_metrics(name: str) -> None:
    model, scores = scored()
    margins = MARGINS if name == "margin" else 0.0
    loss, count = bradley_terry_loss(scores, TIERS, margins)
    (loss / count).backward()
    step = FIXTURE[name]["step"]
    assert (loss / count).item() == pytest.approx(step["loss"], rel=1e-5)
    assert models.grad_norm(model) == pytest.approx(step["grad_norm"], rel=1e-5)
    correct, pairs = ranking_accuracy(scores, TIERS)
    assert (correct / pairs).item() == pytest.approx(step["accuracy"], rel=1e-6)
    leads = scores[:, 0] - scores[:, 1]
    assert leads.mean().item() == pytest.approx(step["margin"], rel=1e-5)
    assert scores.mean().item() == pytest.approx(step["mean_reward"], rel=1e-5)
    for number, row in enumerate(FIXTURE[name]["rows"]):
        one = slice(number, number + 1)
        margin = MARGINS[one] if name == "margin" else 0.0
        alone = bradley_terry_loss(scores[one], TIERS[one], margin).sum
        assert alone.item() == pytest.approx(row["loss"], rel=1e-5)


def test_centring() -> None:
    """TRL has c mean (r_w + r_l)^2, ours c mean r^2; (a + b)^2 = 2 a^2 + 2 b^2 - (a - b)^2."""
    model, scores = scored()
    loss, count = bradley_terry_loss(scores, TIERS)
    squares = centering_loss(scores, TIERS).sum
    leads = (scores[:, 0] - scores[:, 1]).square().sum()
    whole = (loss + 0.01 * (2 * squares - leads)) / count
    for number, row in enumerate(FIXTURE["centring"]["rows"]):
        one = slice(number, number + 1)
        lead = (scores[one, 0] - scores[one, 1]).square().sum()
        term = 2 * centering_loss(scores[one], TIERS[one]).sum - lead
        alone = bradley_terry_loss(scores[one], TIERS[one]).sum + 0.01 * term
        assert alone.item() == pytest.approx(row["loss"], rel=1e-5)
    whole.backward()
    step = FIXTURE["centring"]["step"]
    assert whole.item() == pytest.approx(step["loss"], rel=1e-5)
    assert models.grad_norm(model) == pytest.approx(step["grad_norm"], rel=1e-5)


def test_trl_116_scores_the_token_before_eos_where_pad_is_eos() -> None:
    """So everything else is compared with a pad token of its own."""
    model = models.scorer(models.SCORER)
    for tokens, row in zip(FIXTURE["tokens"], FIXTURE["pad_is_eos"]["rows"], strict=True):
        assert tokens["chosen_ids"][-1] == tokens["rejected_ids"][-1] == models.EOS
        shifted = [plain.score(model, tokens[k][:-1]).item() for k in tokens]
        theirs = [row["min_reward"], row["max_reward"]]
        assert sorted(shifted) == pytest.approx(theirs, rel=1e-5, abs=1e-5)
