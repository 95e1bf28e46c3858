"""PPO (arXiv 1707.06347) for language models, as in lm-human-preferences (arXiv 1909.08593).

B answers of up to T tokens stand in [B, T], left-aligned, `mask` true on generated tokens (the stop
token included). What the gradient steps use is flat, [N] tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int
from torch import Tensor

from prefloop.errors import UserError
from prefloop.losses.kl import k1, k2
from prefloop.losses.masked import masked_sum


class Moments(NamedTuple):
    """Sums that add up over micro-batches and ranks, and the mean and variance they give.

    float64, for the variance is a difference of large numbers.
    """

    sum: Float64[Tensor, ""]
    sum_of_squares: Float64[Tensor, ""]
    count: Int[Tensor, ""]  # type: ignore[assignment]

    @property
    def mean(self) -> Float64[Tensor, ""]:
        """Mean."""
        return self.sum / self.count

    @property
    def variance(self) -> Float64[Tensor, ""]:
        """Unbiased variance (divisor count - 1), as TRL's whitening; 0 of a single value."""
        centred = self.sum_of_squares - self.sum.square() / self.count
        return centred.clamp(min=0) / (self.count - 1).clamp(min=1)


class PolicyLoss(NamedTuple):
    """Sums over `count` tokens of the clipped loss and of what tells how far the policy moved."""

    sum: Float32[Tensor, ""]
    count: Int[Tensor, ""]  # type: ignore[assignment]
    clipfrac_sum: Float32[Tensor, ""]
    approxkl_sum: Float32[Tensor, ""]
    ratio_sum: Float32[Tensor, ""]


class ValueLoss(NamedTuple):
    """Sums over tokens of the clipped value loss and of the tokens where clipping binds."""

    sum: Float32[Tensor, ""]
    clipfrac_sum: Float32[Tensor, ""]


def token_rewards(
    scores: Float[Tensor, " B"],
    log_probs: Float[Tensor, "B T"],
    ref_log_probs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    kl_coef: float,
) -> Float32[Tensor, "B T"]:
    """r_t = -beta (log pi_old(y_t) - log pi_ref(y_t)), the score added at the last generated token.

    The last token is the stop token where there is one. (TRL 1.12 adds the score one position
    later then, on a token that was never generated.)
    """
    penalty = -kl_coef * k1(log_probs.float() - ref_log_probs.float())
    at_the_end = torch.where(_is_last(mask), scores.float()[:, None], 0.0)
    return torch.where(mask, penalty, 0.0) + at_the_end


def _is_last(mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    tokens_left = mask.flip(1).cumsum(1).flip(1)
    return mask & (tokens_left == 1)


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    gamma: float,
    lam: float,
    after: Float[Tensor, " B"] | None = None,
) -> Float32[Tensor, "B T"]:
    """Generalised advantage estimates (arXiv 1506.02438), 0 off the mask; returns are these + V.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}; V after the last token
    is `after`, by default 0, what it is where an answer has ended.
    """
    rewards = torch.where(mask, rewards.float(), 0.0)
    values = torch.where(mask, values.float(), 0.0)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    if after is not None:
        next_values = next_values + torch.where(_is_last(mask), after.float()[:, None], 0.0)
    deltas = rewards + gamma * next_values - values
    advantages = torch.zeros_like(deltas)
    running = deltas.new_zeros(len(deltas))
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages


def moments(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Moments:
    """Sum, sum of squares and count over the mask, to be added over the global batch."""
    real = torch.where(mask, x.double(), 0.0)
    return Moments(real.sum(), real.square().sum(), mask.sum())


def whiten(
    x: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    mean: float | Float[Tensor, ""],
    var: float | Float[Tensor, ""],
    shift_mean: bool = True,
) -> Float32[Tensor, "*shape"]:
    """(x - mean) / sqrt(var + 1e-8), mean and variance the global batch's; 0 off the mask.

    `shift_mean=False` adds the mean back (reward whitening).
    """
    var = torch.as_tensor(var, dtype=torch.float64, device=x.device)
    white = (x.double() - mean) * (var + 1e-8).rsqrt() + (0.0 if shift_mean else mean)
    return torch.where(mask, white.float(), 0.0)


def policy_loss(
    log_probs: Float[Tensor, " N"],
    old_log_probs: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    *,
    cliprange: float,
    clip_high: float | None = None,
) -> PolicyLoss:
    """Clipped surrogate -min(rho A, clip(rho, 1 - e, 1 + e_high) A), rho = pi / pi_old (eq. 7).

    e_high is `clip_high` (clip-higher of DAPO, arXiv 2503.14476, eq. 10), or e where it is None.
    Clip fraction: tokens where clipping raises the loss; approx-KL: k2 of log pi - log pi_old.
    """
    log_ratio = log_probs.float() - old_log_probs.float()
    ratio = log_ratio.exp()
    free = -ratio * advantages.float()
    above = cliprange if clip_high is None else clip_high
    clipped = -ratio.clamp(1 - cliprange, 1 + above) * advantages.float()
    with torch.no_grad():
        clipfrac, approxkl = masked_sum((clipped > free).float()), masked_sum(k2(log_ratio))
        ratio_sum = masked_sum(ratio)
    count = torch.tensor(log_probs.numel(), device=log_probs.device)
    loss = masked_sum(torch.maximum(free, clipped))
    return PolicyLoss(loss, count, clipfrac, approxkl, ratio_sum)


def importance_weights(
    log_probs: Float[Tensor, "*shape"], sampler_log_probs: Float[Tensor, "*shape"], cap: float
) -> Float32[Tensor, "*shape"]:
    """min(pi_old / mu, cap) of each token: pi_old as the trainer computes it, mu what it was drawn
    from.

    Truncated importance weights (Ionides 2008; the rho of IMPALA, arXiv 1802.01561, section 4.1).
    They multiply the clipped loss as pi_prox / pi_behav does in the decoupled objective of arXiv
    2110.00641, section 3.

    >>> importance_weights(torch.tensor([0.7, 0.1]).log(), torch.tensor([0.1, 0.2]).log(), 2.0)
    tensor([2.0000, 0.5000])
    """
    return (log_probs.float() - sampler_log_probs.float()).exp().clamp(max=cap)


def value_loss(
    values: Float[Tensor, " N"],
    old_values: Float[Tensor, " N"],
    returns: Float[Tensor, " N"],
    *,
    cliprange_value: float,
) -> ValueLoss:
    """1/2 max((V - R)^2, (clip(V, V_old - e, V_old + e) - R)^2)."""
    values, old, returns = values.float(), old_values.float(), returns.float()
    near = torch.clamp(values, old - cliprange_value, old + cliprange_value)
    free, clipped = (values - returns).square(), (near - returns).square()
    clipfrac = masked_sum((clipped > free).float())
    return ValueLoss(masked_sum(torch.maximum(free, clipped)) / 2, clipfrac)


def next_kl_coef(
    kl_coef: float, kl: float, *, target: float, episodes: int, horizon: float
) -> float:
    """Adaptive beta: beta (1 + clip(KL / target - 1, -0.2, 0.2) min(1, episodes / horizon)).

    Ziegler et al. (arXiv 1909.08593), section 2.2; `horizon` in episodes is 1 / K_beta. The bound
    of 1 is ours: without it an iteration of more than 5 horizons could make beta negative.

    >>> next_kl_coef(0.1, 12.0, target=6.0, episodes=256, horizon=2560.0)
    0.10200000000000001
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * min(1.0, episodes / horizon))


def rloo_advantages(scores: Float[Tensor, "P K"]) -> Float32[Tensor, "P K"]:
    """Score minus the mean score of the prompt's other K - 1 samples (arXiv 2402.14740)."""
    _require_group(scores)
    scores, k = scores.float(), scores.shape[1]
    return (scores - scores.mean(1, keepdim=True)) * (k / (k - 1))


def grpo_advantages(scores: Float[Tensor, "P K"]) -> Float32[Tensor, "P K"]:
    """Score standardised over the prompt's K samples (arXiv 2402.03300): (s - mean) / (std + 1e-4).

    std has divisor K - 1; the 1e-4, as in TRL, gives 0 where all samples score alike.
    """
    _require_group(scores)
    scores = scores.float()
    return (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4)


def dr_grpo_advantages(scores: Float[Tensor, "P K"]) -> Float32[Tensor, "P K"]:
    """Score minus the mean over the prompt's K samples (Dr. GRPO, arXiv 2503.20783).

    Not divided by their deviation, so that prompts whose samples score nearly alike do not weigh
    more; `rloo_advantages` times (K - 1) / K.
    """
    _require_group(scores)
    scores = scores.float()
    return scores - scores.mean(1, keepdim=True)


def _require_group(scores: Float[Tensor, "P K"]) -> None:
    if scores.shape[1] < 2:
        raise UserError("a group baseline needs 2 samples per prompt: raise samples_per_prompt")
