"""DPO and its kin against TRL 1.16's DPOTrainer, CPOTrainer, ORPOTrainer and KTOTrainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from prefloop.losses import (
    Total,
    apo_zero_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    plackett_luce_dpo_loss,
    robust_loss,
    sft_loss,
    sigmoid_loss,
    sigmoid_norm_loss,
    simpo_loss,
)
from tests.parity import models, plain, rows

FIXTURE = models.read("preference")
KTO = models.read("kto")
BETA = 0.1


class Forward(NamedTuple):
    """The policy with the log-probs that one plain forward per sequence gives."""

    policy: nn.Module
    chosen_tokens: list[Tensor]
    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    lengths: tuple[Tensor, Tensor]

    @property
    def four(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.chosen, self.rejected, self.ref_chosen, self.ref_rejected

    def row(self, number: int) -> Forward:
        """That row alone."""
        one = slice(number, number + 1)
        return self._replace(
            chosen_tokens=self.chosen_tokens[one],
            chosen=self.chosen[one],
            rejected=self.rejected[one],
            ref_chosen=self.ref_chosen[one],
            ref_rejected=self.ref_rejected[one],
            lengths=(self.lengths[0][one], self.lengths[1][one]),
        )

    @property
    def nll(self) -> Tensor:
        """Mean over the chosen answers' tokens."""
        loss, count = sft_loss(torch.cat(self.chosen_tokens))
        return loss / count


def forward(tokens: list[dict[str, list[int]]]) -> Forward:
    policy, reference = models.causal_lm(models.POLICY), models.causal_lm(models.REFERENCE)
    assert models.fingerprint(policy) == pytest.approx(FIXTURE["policy"], rel=1e-7)
    assert models.fingerprint(reference) == pytest.approx(FIXTURE["reference"], rel=1e-7)

    def of(model: Any, key: str) -> list[Tensor]:
        return [plain.token_log_probs(model, row["prompt_ids"], row[key]) for row in tokens]

    def sums(parts: list[Tensor]) -> Tensor:
        return torch.stack([part.sum() for part in parts])

    chosen, rejected = of(policy, "chosen_ids"), of(policy, "rejected_ids")
    with torch.no_grad():
        refs = sums(of(reference, "chosen_ids")), sums(of(reference, "rejected_ids"))
    lengths = [
        torch.tensor([len(row[k]) for row in tokens]) for k in ("chosen_ids", "rejected_ids")
    ]
    return Forward(
        policy, chosen, sums(chosen), sums(rejected), *refs, lengths=(lengths[0], lengths[1])
    )


def mean(total: Total) -> Tensor:
    return total.sum / total.count


DPO: dict[str, Callable[[Forward], Tensor]] = {
    "sigmoid": lambda f: mean(sigmoid_loss(*f.four, beta=BETA)),
    "cdpo": lambda f: mean(sigmoid_loss(*f.four, beta=BETA, label_smoothing=0.1)),
    "sigmoid_sft": lambda f: mean(sigmoid_loss(*f.four, beta=BETA)) + 0.5 * f.nll,
    "robust": lambda f: mean(robust_loss(*f.four, beta=BETA, label_smoothing=0.1)),
    "hinge": lambda f: mean(hinge_loss(*f.four, beta=BETA)),
    "apo_zero": lambda f: mean(apo_zero_loss(*f.four, beta=BETA)),
    "sigmoid_norm": lambda f: mean(sigmoid_norm_loss(*f.four, *f.lengths, beta=BETA)),
    "ipo": lambda f: mean(
        ipo_loss(*f.four, beta=BETA, chosen_lengths=f.lengths[0], rejected_lengths=f.lengths[1])
    ),
    "simpo": lambda f: mean(simpo_loss(f.chosen, f.rejected, *f.lengths, beta=2.0, gamma=0.5)),
    "simpo_sft": lambda f: DPO["simpo"](f) + 0.5 * f.nll,
    "cdpo_without_reference": lambda f: mean(
        sigmoid_loss(
            *(f.chosen, f.rejected, torch.zeros_like(f.chosen), torch.zeros_like(f.rejected)),
            beta=BETA,
            label_smoothing=0.1,
        )
    ),
}


@pytest.mark.parametrize("name", [*DPO, "chat"])
def test_loss_and_gradient(name: str) -> None:
    f = forward(FIXTURE["chat" if name == "chat" else "sigmoid"].get("tokens", FIXTURE["tokens"]))
    of = DPO["sigmoid" if name == "chat" else name]
    loss = of(f)
    loss.backward()
    step = FIXTURE[name]["step"]
    assert loss.item() == pytest.approx(step["loss"], rel=1e-5)
    assert models.grad_norm(f.policy) == pytest.approx(step["grad_norm"], rel=1e-5)
    for number, row in enumerate(FIXTURE[name]["rows"]):
        assert of(f.row(number)).item() == pytest.approx(row["loss"], rel=1e-5)


def test_plackett_luce_of_two_answers_is_sigmoid() -> None:
    """TRL has no losses over rankings."""
    f = forward(FIXTURE["tokens"])
    policy = torch.stack([f.chosen, f.rejected], 1)
    reference = torch.stack([f.ref_chosen, f.ref_rejected], 1)
    tiers = torch.tensor([[0, 1]] * len(policy))
    loss = mean(plackett_luce_dpo_loss(policy, reference, tiers, beta=BETA))
    loss.backward()
    step = FIXTURE["sigmoid"]["step"]
    assert loss.item() == pytest.approx(step["loss"], rel=1e-5)
    assert models.grad_norm(f.policy) == pytest.approx(step["grad_norm"], rel=1e-5)


def test_metrics_and_log_probs_of_each_row() -> None:
    f = forward(FIXTURE["tokens"])
    chosen, rejected = BETA * (f.chosen - f.ref_chosen), BETA * (f.rejected - f.ref_rejected)
    ours = {
        "logps/chosen": f.chosen,
        "logps/rejected": f.rejected,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),
    }
    for name, values in ours.items():
        assert values.mean().item() == pytest.approx(FIXTURE["sigmoid"]["step"][name], rel=1e-5)
        theirs = [row[name] for row in FIXTURE["sigmoid"]["rows"]]
        assert values.tolist() == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def test_trl_116_ignores_label_smoothing_of_sigmoid() -> None:
    """So cDPO is compared with `aot`, and with CPOTrainer, which has no reference."""
    assert FIXTURE["sigmoid_smoothed"]["options"]["label_smoothing"] == 0.1
    assert FIXTURE["sigmoid_smoothed"]["step"] == FIXTURE["sigmoid"]["step"]


def test_orpo() -> None:
    """The odds-ratio term is TRL's; TRL's NLL counts the prompt's tokens too, the paper's and ours
    the answer's alone."""
    f = forward(FIXTURE["tokens"])
    odds = mean(orpo_loss(f.chosen, f.rejected, *f.lengths))
    step = FIXTURE["orpo"]["step"]
    assert odds.item() == pytest.approx(-step["log_odds_ratio"], rel=1e-5)
    whole = [[*row["prompt_ids"], *row["chosen_ids"]] for row in FIXTURE["tokens"]]
    log_probs = [plain.token_log_probs(f.policy, ids[:1], ids[1:]) for ids in whole]  # type: ignore[arg-type]
    loss = mean(sft_loss(torch.cat(log_probs))) + BETA * odds
    loss.backward()
    assert loss.item() == pytest.approx(step["loss"], rel=1e-5)
    assert models.grad_norm(f.policy) == pytest.approx(step["grad_norm"], rel=1e-5)
    for number, row in enumerate(FIXTURE["orpo"]["rows"]):
        one = f.row(number)
        alone = orpo_loss(one.chosen, one.rejected, *one.lengths).sum
        assert alone.item() == pytest.approx(-row["log_odds_ratio"], rel=1e-5)
        per_token = one.chosen / one.lengths[0], one.rejected / one.lengths[1]
        for name, value in zip(("chosen", "rejected"), per_token, strict=True):
            assert value.item() == pytest.approx(row[f"logps/{name}"], rel=1e-5)
            assert BETA * value.item() == pytest.approx(row[f"rewards/{name}"], rel=1e-5)


def test_kto() -> None:
    policy, reference = models.causal_lm(models.POLICY), models.causal_lm(models.REFERENCE)

    def sums(model: Any, key: str) -> Tensor:
        return torch.stack(
            [plain.token_log_probs(model, r["prompt_ids"], r[key]).sum() for r in KTO["tokens"]]
        )

    log_probs = sums(policy, "completion_ids")
    with torch.no_grad():
        ref = sums(reference, "completion_ids")
        kl = (sums(policy, "KL_completion_ids") - sums(reference, "KL_completion_ids")).mean()
    labels = torch.tensor([row["label"] for row in rows.UNPAIRED])
    step = KTO["step"]
    assert kl.item() == pytest.approx(step["kl"], abs=1e-5)  # a small mean of large sums
    loss = mean(kto_loss(log_probs, ref, labels, kl, beta=BETA, **KTO["options"]))
    loss.backward()
    assert loss.item() == pytest.approx(step["loss"], rel=1e-5)
    assert models.grad_norm(policy) == pytest.approx(step["grad_norm"], rel=1e-5)
    rewards = BETA * (log_probs - ref)
    for name, chosen in (("chosen", labels), ("rejected", ~labels)):
        expected = step[f"rewards/{name}"], step[f"logps/{name}"]
        assert rewards[chosen].mean().item() == pytest.approx(expected[0], rel=1e-5)
        assert log_probs[chosen].mean().item() == pytest.approx(expected[1], rel=1e-5)
