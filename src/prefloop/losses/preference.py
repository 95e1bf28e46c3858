"""DPO (arXiv 2305.18290) and kin, on summed log-probs of whole answers.

chosen, rejected: log pi(y|x) of the better and the worse answer of each of M pairs, summed over
answer tokens; ref_chosen, ref_rejected: the frozen reference's. c = chosen - ref_chosen,
l = rejected - ref_rejected, d = c - l. Every loss returns a sum over pairs and their count.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from prefloop.losses.masked import Total, total
from prefloop.losses.reward import plackett_luce_loss


def sigmoid_loss(
    chosen: Float[Tensor, " M"],
    rejected: Float[Tensor, " M"],
    ref_chosen: Float[Tensor, " M"],
    ref_rejected: Float[Tensor, " M"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
    margin: float | Float[Tensor, " M"] = 0.0,
) -> Total:
    """DPO (eq. 7): -log sigma(x), x = beta d - m; with e = label_smoothing, conservative DPO.

    -(1 - e) log sigma(x) - e log sigma(-x), e the share of labels believed flipped; m the margin of
    DPO with an offset (arXiv 2402.10571, eq. 6), by which the better answer should lead.

    >>> zero = torch.zeros(1)
    >>> sigmoid_loss(zero, zero, zero, zero, beta=0.1).sum
    tensor(0.6931)
    """
    x = beta * _log_ratio_gap(chosen, rejected, ref_chosen, ref_rejected) - margin
    return total(-(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x))


def robust_loss(
    chosen: Float[Tensor, " M"],
    rejected: Float[Tensor, " M"],
    ref_chosen: Float[Tensor, " M"],
    ref_rejected: Float[Tensor, " M"],
    *,
    beta: float,
    label_smoothing: float,
) -> Total:
    """Robust DPO (arXiv 2403.00409): unbiased when a share e < 1/2 of the labels is flipped.

    [-(1 - e) log sigma(beta d) + e log sigma(-beta d)] / (1 - 2e).
    """
    x = beta * _log_ratio_gap(chosen, rejected, ref_chosen, ref_rejected)
    loss = -(1 - label_smoothing) * F.logsigmoid(x) + label_smoothing * F.logsigmoid(-x)
    return total(loss / (1 - 2 * label_smoothing))


def ipo_loss(
    chosen: Float[Tensor, " M"],
    rejected: Float[Tensor, " M"],
    ref_chosen: Float[Tensor, " M"],
    ref_rejected: Float[Tensor, " M"],
    *,
    beta: float,
    chosen_lengths: Int[Tensor, " M"] | None = None,
    rejected_lengths: Int[Tensor, " M"] | None = None,
) -> Total:
    """IPO (arXiv 2310.12036, eq. 17): (d - 1 / (2 beta))^2.

    With lengths (both), c and l are averaged per token, as in TRL; without, summed as in the paper.
    """
    c = chosen.float() - ref_chosen.float()
    l = rejected.float() - ref_rejected.float()
    if chosen_lengths is not None and rejected_lengths is not None:
        c, l = c / chosen_lengths, l / rejected_lengths
    return total((c - l - 1 / (2 * beta)).square())


def hinge_loss(
    chosen: Float[Tensor, " M"],
    rejected: Float[Tensor, " M"],
    ref_chosen: Float[Tensor, " M"],
    ref_rejected: Float[Tensor, " M"],
    *,
    beta: float,
) -> Total:
    """Hinge (SLiC, arXiv 2305.10425, on log-ratios): max(0, 1 - beta d)."""
    return total(F.relu(1 - beta * _log_ratio_gap(chosen, rejected, ref_chosen, ref_rejected)))


def sigmoid_norm_loss(
    chosen: Float[Tensor, " M"],
    rejected: Float[Tensor, " M"],
    ref_chosen: Float[Tensor, " M"],
    ref_rejected: Float[Tensor, " M"],
    chosen_lengths: Int[Tensor, " M"],
    rejected_lengths: Int[Tensor, " M"],
    *,
    beta: float,
) -> Total:
    """Length-normalised DPO (Tulu 3, arXiv 2411.15124): -log sigma(beta (c / |y_w| - l / |y_l|)).

    A log-ratio counts per token, so beta is larger than DPO's; Tulu 3 takes 5.
    """
    c = (chosen.float() - ref_chosen.float()) / chosen_lengths
    l = (rejected.float() - ref_rejected.float()) / rejected_lengths
    return total(-F.logsigmoid(beta * (c - l)))


def apo_zero_loss(
    chosen: Float[Tensor, " M"],
    rejected: Float[Tensor, " M"],
    ref_chosen: Float[Tensor, " M"],
    ref_rejected: Float[Tensor, " M"],
    *,
    beta: float,
) -> Total:
    """APO-zero (arXiv 2408.06266, eq. 7): (1 - sigma(beta c)) + sigma(beta l).

    Each answer is moved by itself: the chosen one above the reference, the rejected one below it.
    The 1, as in TRL, keeps the loss above 0; the paper leaves it out.
    """
    c = beta * (chosen.float() - ref_chosen.float())
    l = beta * (rejected.float() - ref_rejected.float())
    return total(torch.sigmoid(-c) + torch.sigmoid(l))


def simpo_loss(
    chosen: Float[Tensor, " M"],
    rejected: Float[Tensor, " M"],
    chosen_lengths: Int[Tensor, " M"],
    rejected_lengths: Int[Tensor, " M"],
    *,
    beta: float,
    gamma: float,
) -> Total:
    """SimPO (arXiv 2405.14734, eq. 6), without a reference, with target margin gamma.

    -log sigma(beta (log pi(y_w) / |y_w| - log pi(y_l) / |y_l|) - gamma).
    """
    gap = chosen.float() / chosen_lengths - rejected.float() / rejected_lengths
    return total(-F.logsigmoid(beta * gap - gamma))


def orpo_loss(
    chosen: Float[Tensor, " M"],
    rejected: Float[Tensor, " M"],
    chosen_lengths: Int[Tensor, " M"],
    rejected_lengths: Int[Tensor, " M"],
) -> Total:
    """ORPO's odds-ratio term (arXiv 2403.07691, eq. 7): -log sigma(log odds_w - log odds_l).

    odds = P / (1 - P), log P the mean log-prob per token. The whole loss is the chosen answers'
    `sft_loss` plus lambda times this.
    """
    gap = _log_odds(chosen, chosen_lengths) - _log_odds(rejected, rejected_lengths)
    return total(-F.logsigmoid(gap))


def kto_loss(
    log_probs: Float[Tensor, " A"],
    ref_log_probs: Float[Tensor, " A"],
    labels: Bool[Tensor, " A"],
    kl_estimate: float | Float[Tensor, ""],
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Total:
    """KTO (arXiv 2402.01306, eq. 8) on A unpaired answers, labelled desirable or not.

    lambda_D (1 - sigma(beta (c - z))) where desirable, lambda_U (1 - sigma(beta (z - c))) where
    not; c = log pi - log pi_ref, z = max(0, kl_estimate) the whole batch's estimate of
    KL(pi || pi_ref) in nats, through which no gradient flows.
    """
    z = torch.as_tensor(kl_estimate, device=log_probs.device).detach().float().clamp(min=0)
    x = beta * (log_probs.float() - ref_log_probs.float() - z)
    desirable = desirable_weight * torch.sigmoid(-x)
    return total(torch.where(labels, desirable, undesirable_weight * torch.sigmoid(x)))


def plackett_luce_dpo_loss(
    log_probs: Float[Tensor, "P K"],
    ref_log_probs: Float[Tensor, "P K"],
    tiers: Int[Tensor, "P K"],
    *,
    beta: float,
) -> Total:
    """DPO over rankings (App. A.3): Plackett-Luce loss of rewards beta (log pi - log pi_ref).

    `tiers` as in `prefloop.losses.reward`; equals `sigmoid_loss` at K = 2.
    """
    return plackett_luce_loss(beta * (log_probs.float() - ref_log_probs.float()), tiers)


def _log_ratio_gap(
    chosen: Float[Tensor, " M"],
    rejected: Float[Tensor, " M"],
    ref_chosen: Float[Tensor, " M"],
    ref_rejected: Float[Tensor, " M"],
) -> Float32[Tensor, " M"]:
    """d = (log pi - log pi_ref)(y_w) - (log pi - log pi_ref)(y_l)."""
    return (chosen.float() - ref_chosen.float()) - (rejected.float() - ref_rejected.float())


def _log_odds(log_probs: Float[Tensor, " M"], lengths: Int[Tensor, " M"]) -> Float32[Tensor, " M"]:
    """log(P / (1 - P)) of the mean per-token probability, finite even where P rounds to 1."""
    mean = (log_probs.float() / lengths).clamp(max=-torch.finfo(torch.float32).eps)
    return mean - torch.log(-torch.expm1(mean))
