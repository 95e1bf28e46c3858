"""Estimators of KL(pi || pi_ref) from samples of pi (Schulman, "Approximating KL divergence").

q = log pi(y) - log pi_ref(y) of a sampled token or answer. As a loss only k2 has the KL's gradient:
that of k1 is zero in expectation, that of k3 belongs to another divergence.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32
from torch import Tensor


def k1(q: Float[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """q: unbiased, may be negative."""
    return q.float()


def k2(q: Float[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """q^2 / 2: biased, small variance; its gradient in expectation is the KL's."""
    return q.float().square() / 2


def k3(q: Float[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """exp(-q) - 1 + q: unbiased, never negative."""
    return torch.expm1(-q.float()) + q.float()
