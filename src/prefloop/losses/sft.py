"""Supervised fine-tuning: negative log-likelihood."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from prefloop.losses.masked import Total, total


def sft_loss(log_probs: Float[Tensor, " N"]) -> Total:
    """Negative log-likelihood of the N answer tokens: sum_t -log pi(y_t | x, y_<t).

    Divide by the token count of the whole optimiser step, never per micro-batch.
    """
    return total(-log_probs)
