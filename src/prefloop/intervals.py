"""Estimates with the interval that resampling gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Grouped = Sequence[Sequence[float]]
"""One number an answer, in one list a prompt."""
RESAMPLES = 4000


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % percentile-bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def above(self, other: Interval) -> bool:
        """Whether this interval lies wholly above the other."""
        return self.low > other.high


def bootstrap(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean of one value a prompt; the interval comes from resampling prompts."""
    if not values:
        raise ValueError("bootstrap: no values; at least one prompt is needed")
    array = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(array), np.full(len(array), 1 / len(array)), size=resamples)
    low, high = np.quantile(draws @ array / len(array), [0.025, 0.975])
    return Interval(float(array.mean()), float(low), float(high))


def mean_score(scores: Grouped, seed: int = 0) -> Interval:
    """Mean over prompts of a prompt's mean score; answers to one prompt are resampled together."""
    return bootstrap([sum(row) / len(row) for row in scores], seed)
