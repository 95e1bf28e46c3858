"""The reductions that every loss and metric shares. Sums are float32 whatever comes in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor


class Total(NamedTuple):
    """A sum and the number of things summed.

    Totals of the parts of a batch add up to the batch's, however it is split; only the optimiser
    step divides, once, by the count over all its micro-batches and ranks.
    """

    sum: Float32[Tensor, ""]
    count: Int[Tensor, ""]  # type: ignore[assignment]  # hides tuple.count, of no use here


def masked_sum(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | None = None
) -> Float32[Tensor, ""]:
    """Sum of `x` where `mask` holds (everywhere without one); what is masked may be NaN.

    >>> masked_sum(torch.tensor([1.0, float("nan")]), torch.tensor([True, False]))
    tensor(1.)
    """
    x = x.float()
    return x.sum() if mask is None else torch.where(mask, x, 0.0).sum()


def total(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | None = None) -> Total:
    """Masked sum of `x` with the number of its terms."""
    terms = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    return Total(masked_sum(x, mask), terms.sum())


def segment_sum(
    x: Float[Tensor, " N"], index: Int[Tensor, " N"], size: int
) -> Float32[Tensor, " size"]:
    """Sum of `x` per segment: out[s] = sum of x[n] where index[n] = s; an empty segment gives 0.

    With token log-probs and their answer's number this is log pi(y|x) of each answer.
    """
    return x.new_zeros(size, dtype=torch.float32).index_add(0, index, x.float())
