"""Reward-model losses over rankings.

`scores[P, K]` are the reward model's scores of K answers to each of P prompts. `tiers[P, K]` are
their ranks: 0 is best, equal numbers are ties, -1 marks an absent answer (whose score is ignored).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from prefloop.losses.masked import Total, masked_sum, total

Normalize = Literal["prompt", "pair"]


def bradley_terry_loss(
    scores: Float[Tensor, "P K"],
    tiers: Int[Tensor, "P K"],
    margin: float
    | Float[
        Tensor,
        (
            P  # K #K
        ),
    ] = 0.0,
    normalize: Normalize = "prompt",
) -> Total:
    """Bradley-Terry loss of every strictly ordered pair: -log sigma(r_w - r_l - m).

    InstructGPT (arXiv 2203.02155), eq. 1, with an optional margin `m[p, winner, loser]`, or
    one a prompt, [P, 1, 1]. "prompt": mean over a prompt's pairs, summed over prompts (count:
    prompts with a pair); "pair": sum over all pairs (count: pairs). Ties are left out.

    >>> bradley_terry_loss(torch.tensor([[1.0, 1.0]]), torch.tensor([[0, 1]])).sum
    tensor(0.6931)
    """
    loss = F.softplus(margin - _differences(scores, tiers))
    return _pair_total(loss, _wins(tiers), normalize)


def plackett_luce_loss(scores: Float[Tensor, "P K"], tiers: Int[Tensor, "P K"]) -> Total:
    """Plackett-Luce loss of each ranking: -sum_k [r_k - logsumexp(r_k..r_K)]; Bradley-Terry at K=2.

    Answers that tie are not compared with each other: each competes with itself and those strictly
    below. Count: prompts with a strictly ordered pair.
    """
    wins = _wins(tiers)
    rivals = wins | torch.eye(tiers.shape[1], dtype=torch.bool, device=tiers.device)
    chance = torch.where(rivals, -_differences(scores, tiers), -torch.inf)
    beats_some = wins.any(-1)
    return Total(masked_sum(chance.logsumexp(-1), beats_some), beats_some.any(-1).sum())


def rao_kupper_loss(
    scores: Float[Tensor, "P K"],
    tiers: Int[Tensor, "P K"],
    theta: float,
    normalize: Normalize = "prompt",
) -> Total:
    """Rao-Kupper loss of pairs and ties, with threshold theta > 1 (Rao & Kupper 1967).

    P(i > j) = sigma(d - log theta), P(tie) = (theta^2 - 1) sigma(d - log theta)
    sigma(-d - log theta), with d = r_i - r_j. Normalised as `bradley_terry_loss`, ties counted.
    """
    d, wins, ties = _differences(scores, tiers), _wins(tiers), _ties(tiers)
    win = F.softplus(math.log(theta) - d)
    tie = win + F.softplus(math.log(theta) + d) - math.log(theta**2 - 1)
    return _pair_total(torch.where(ties, tie, win), wins | ties, normalize)


def davidson_loss(
    scores: Float[Tensor, "P K"],
    tiers: Int[Tensor, "P K"],
    nu: float,
    normalize: Normalize = "prompt",
) -> Total:
    """Davidson loss of pairs and ties, with tie propensity nu > 0 (Davidson 1970).

    With p = e^r: P(i > j) = p_i / (p_i + p_j + nu sqrt(p_i p_j)), P(tie) = nu sqrt(p_i p_j) / the
    same. Normalised as `bradley_terry_loss`, ties counted.
    """
    d, wins, ties = _differences(scores, tiers), _wins(tiers), _ties(tiers)
    chances = torch.stack([d / 2, -d / 2, torch.full_like(d, math.log(nu))], -1).log_softmax(-1)
    loss = -torch.where(ties, chances[..., 2], chances[..., 0])
    return _pair_total(loss, wins | ties, normalize)


def centering_loss(scores: Float[Tensor, "P K"], tiers: Int[Tensor, "P K"]) -> Total:
    """Square of every scored answer's score, r^2; its mean, times c, keeps scores around 0.

    Departs from Eisenstein et al. (arXiv 2312.09244) and TRL, which square a pair's sum
    r_w + r_l and so leave the scores of rankings free to drift apart from 0.
    """
    return total(_present(scores, tiers).square(), tiers >= 0)


def ranking_accuracy(scores: Float[Tensor, "P K"], tiers: Int[Tensor, "P K"]) -> Total:
    """Strictly ordered pairs that the scores order alike; equal scores count half."""
    d = _differences(scores, tiers)
    return total((d > 0).float() + (d == 0).float() / 2, _wins(tiers))


def _present(scores: Float[Tensor, "P K"], tiers: Int[Tensor, "P K"]) -> Float32[Tensor, "P K"]:
    """Scores in float32, 0 for absent answers: whatever stands there, NaN too, reaches nothing."""
    return torch.where(tiers >= 0, scores.float(), 0.0)


def _differences(
    scores: Float[Tensor, "P K"], tiers: Int[Tensor, "P K"]
) -> Float32[Tensor, "P K K"]:
    """r_i - r_j of answers i, j to one prompt."""
    present = _present(scores, tiers)
    return present[:, :, None] - present[:, None, :]


def _wins(tiers: Int[Tensor, "P K"]) -> Bool[Tensor, "P K K"]:
    """Whether answer i ranks strictly above answer j."""
    return (tiers[:, :, None] < tiers[:, None, :]) & (tiers >= 0)[:, :, None]


def _ties(tiers: Int[Tensor, "P K"]) -> Bool[Tensor, "P K K"]:
    """Whether answers i < j tie (each such pair once)."""
    same = (tiers[:, :, None] == tiers[:, None, :]) & (tiers >= 0)[:, :, None]
    return same.triu(diagonal=1)


def _pair_total(
    loss: Float[Tensor, "P K K"], pairs: Bool[Tensor, "P K K"], normalize: Normalize
) -> Total:
    """Total over pairs, or over prompts of the mean over each prompt's pairs."""
    if normalize == "pair":
        return total(loss, pairs)
    per_prompt = pairs.sum((1, 2))
    share = per_prompt.clamp(min=1)[:, None, None]
    return Total(masked_sum(loss / share, pairs), (per_prompt > 0).sum())
