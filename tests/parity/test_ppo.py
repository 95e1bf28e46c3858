"""PPO against TRL 1.12's PPOTrainer: log-probs -> rewards -> advantages -> returns -> losses.

Where a stop token ended an answer, TRL puts the score one position later, on a state after the
answer, and trains the critic there too. That is prefloop's own chain over a mask of one more
position, which is how the `stop` fixture is compared. In `length` no answer stops, and both agree
as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from prefloop.losses import (
    gae,
    k1,
    k3,
    moments,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from tests.parity import models, plain

FIXTURE = models.read("ppo")
VARIANTS = ("stop", "length", "whitened", "discounted")
TEMPERATURE = 0.7
DEFAULTS = {
    **{"kl_coef": 0.05, "gamma": 1.0, "lam": 0.95},
    **{"cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1},
}


class Rollout(NamedTuple):
    """TRL's numbers [B, T], and the masks of real tokens and of those with one more position."""

    trl: dict[str, Tensor]
    mask: Tensor
    mask_p1: Tensor


def rollout(variant: str) -> Rollout:
    trl = {
        k: torch.tensor(v)
        for k, v in FIXTURE[variant]["rollout"].items()
        if k not in ("prompts", "answers")
    }
    places = torch.arange(trl["logprobs"].shape[1])
    return Rollout(trl, places <= trl["last"][:, None], places <= trl["last"][:, None] + 1)


def settings(variant: str, *names: str) -> dict[str, float]:
    options = {**DEFAULTS, **FIXTURE[variant]["options"]}
    return {name: options[name] for name in names}


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def whitened(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    m = moments(x, mask)
    return whiten(x, mask, m.mean, m.variance, shift_mean)


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_probs_values_and_scores(variant: str) -> None:
    trl, mask, mask_p1 = rollout(variant)
    policy, reference = models.causal_lm(models.POLICY), models.causal_lm(models.REFERENCE)
    reward_model, critic = models.scorer(models.SCORER), models.scorer(models.CRITIC)
    for name, model in zip(
        ("policy", "reference", "scorer", "critic"),
        (policy, reference, reward_model, critic),
        strict=True,
    ):
        assert models.fingerprint(model) == pytest.approx(FIXTURE[name], rel=1e-7)
    told = FIXTURE[variant]["rollout"]
    with torch.no_grad():
        for b, (prompt, answer) in enumerate(zip(told["prompts"], told["answers"], strict=True)):
            real = mask[b]
            for model, name in ((policy, "logprobs"), (reference, "ref_logprobs")):
                ours = plain.token_log_probs(model, prompt, answer, TEMPERATURE)
                close(ours, trl[name][b][real])
            values = trl["values"][b][mask_p1[b]]
            close(plain.token_values(critic, prompt, answer)[: len(values)], values)
            close(plain.score(reward_model, [*prompt, *answer]), trl["scores"][b])


@pytest.mark.parametrize("variant", VARIANTS)
def test_kl_of_each_token(variant: str) -> None:
    trl, mask, _ = rollout(variant)
    close(k1(trl["logprobs"] - trl["ref_logprobs"]) * mask, trl["kl"])


def test_k3_of_each_token() -> None:
    trl = {name: torch.tensor(values) for name, values in FIXTURE["k3"].items()}
    close(k3(trl["logprobs"] - trl["ref_logprobs"]), trl["kl"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_rewards_advantages_and_returns(variant: str) -> None:
    trl, mask, mask_p1 = rollout(variant)
    rewards = token_rewards(
        trl["scores"],
        trl["logprobs"],
        trl["ref_logprobs"],
        mask_p1,
        **settings(variant, "kl_coef"),
    )
    if variant == "whitened":
        rewards = whitened(rewards, mask_p1, shift_mean=False)
    close(rewards, trl["rewards"])
    advantages = gae(rewards, trl["values"], mask_p1, **settings(variant, "gamma", "lam"))
    close(advantages + trl["values"], trl["returns"])
    close(whitened(advantages, mask), trl["advantages"])


def test_trl_112_adds_the_score_one_position_late_after_a_stop_token() -> None:
    trl, mask, _ = rollout("stop")
    stopped = trl["last"] < mask.shape[1] - 1
    assert stopped.sum() == 3
    ours = token_rewards(
        trl["scores"], trl["logprobs"], trl["ref_logprobs"], mask, **settings("stop", "kl_coef")
    )
    for b in range(len(ours)):
        last = int(trl["last"][b])
        moved = trl["rewards"][b].clone()
        if stopped[b]:
            close(moved[last + 1], trl["scores"][b])
            moved[last] += moved[last + 1]
            moved[last + 1] = 0.0
        close(ours[b], moved)


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses(variant: str, epoch: int) -> None:
    trl, mask, mask_p1 = rollout(variant)
    step = FIXTURE[variant]["epochs"][epoch]
    log_probs, values = torch.tensor(step["log_probs"]), torch.tensor(step["values"])
    policy = policy_loss(
        log_probs[mask],
        trl["logprobs"][mask],
        trl["advantages"][mask],
        **settings(variant, "cliprange"),
    )
    close(policy.sum / policy.count, torch.tensor(step["policy_loss"]))
    close(policy.clipfrac_sum / policy.count, torch.tensor(step["clipfrac"]))
    close(policy.approxkl_sum / mask.numel(), torch.tensor(step["approxkl"]))  # TRL: padding too
    padding = mask.numel() - policy.count
    close((policy.ratio_sum + padding) / mask.numel(), torch.tensor(step["ratio"]))
    value = value_loss(
        values[mask_p1],
        trl["values"][mask_p1],
        trl["returns"][mask_p1],
        **settings(variant, "cliprange_value"),
    )
    close(value.sum / mask_p1.sum(), torch.tensor(step["value_loss"]))
    close(value.clipfrac_sum / mask_p1.sum(), torch.tensor(step["value_clipfrac"]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_the_first_step(variant: str) -> None:
    trl, mask, mask_p1 = rollout(variant)
    told = FIXTURE[variant]["rollout"]
    texts = list(zip(told["prompts"], told["answers"], strict=True))
    step = FIXTURE[variant]["epochs"][0]

    policy = models.causal_lm(models.POLICY)
    log_probs = torch.cat([plain.token_log_probs(policy, *text, TEMPERATURE) for text in texts])
    loss = policy_loss(
        log_probs,
        trl["logprobs"][mask],
        trl["advantages"][mask],
        **settings(variant, "cliprange"),
    )
    (loss.sum / loss.count).backward()
    assert models.grad_norm(policy) == pytest.approx(step["policy_grad_norm"], rel=1e-5)

    critic = models.scorer(models.CRITIC)
    values = [
        plain.token_values(critic, *text)[: int(row.sum())]
        for text, row in zip(texts, mask_p1, strict=True)
    ]
    value = value_loss(
        torch.cat(values),
        trl["values"][mask_p1],
        trl["returns"][mask_p1],
        **settings(variant, "cliprange_value"),
    )
    (settings(variant, "vf_coef")["vf_coef"] * value.sum / mask_p1.sum()).backward()
    assert models.grad_norm(critic) == pytest.approx(step["critic_grad_norm"], rel=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_metrics(variant: str) -> None:
    trl, mask, _ = rollout(variant)
    metrics: dict[str, Any] = FIXTURE[variant]["metrics"]
    kl = ((trl["logprobs"] - trl["ref_logprobs"]) * mask).sum(1).mean()
    score, kl_coef = trl["scores"].mean(), settings(variant, "kl_coef")["kl_coef"]
    ours = {
        "objective/kl": kl,
        "objective/entropy": -(trl["logprobs"] * mask).sum(1).mean(),
        "objective/scores": score,
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": score - kl_coef * kl,
    }
    for name, value in ours.items():
        assert value.item() == pytest.approx(metrics[name], rel=1e-5)
