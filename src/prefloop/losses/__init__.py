"""Losses as pure functions: tensors and keyword floats in, sums and counts out."""

from prefloop.losses.kl import k1, k2, k3
from prefloop.losses.masked import Total, masked_sum, segment_sum, total
from prefloop.losses.ppo import (
    Moments,
    PolicyLoss,
    ValueLoss,
    gae,
    grpo_advantages,
    moments,
    next_kl_coef,
    policy_loss,
    rloo_advantages,
    token_rewards,
    value_loss,
    whiten,
)
from prefloop.losses.preference import (
    hinge_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    plackett_luce_dpo_loss,
    robust_loss,
    sigmoid_loss,
    simpo_loss,
)
from prefloop.losses.reward import (
    bradley_terry_loss,
    centering_loss,
    davidson_loss,
    plackett_luce_loss,
    ranking_accuracy,
    rao_kupper_loss,
)
from prefloop.losses.sft import sft_loss

__all__ = [
    "Moments",
    "PolicyLoss",
    "Total",
    "ValueLoss",
    "bradley_terry_loss",
    "centering_loss",
    "davidson_loss",
    "gae",
    "grpo_advantages",
    "hinge_loss",
    "ipo_loss",
    "k1",
    "k2",
    "k3",
    "kto_loss",
    "masked_sum",
    "moments",
    "next_kl_coef",
    "orpo_loss",
    "plackett_luce_dpo_loss",
    "plackett_luce_loss",
    "policy_loss",
    "ranking_accuracy",
    "rao_kupper_loss",
    "rloo_advantages",
    "robust_loss",
    "segment_sum",
    "sft_loss",
    "sigmoid_loss",
    "simpo_loss",
    "token_rewards",
    "total",
    "value_loss",
    "whiten",
]
