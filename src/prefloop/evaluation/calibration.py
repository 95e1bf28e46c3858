"""How far a reward model can be trusted: accuracy, log loss, calibration, length, ceiling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Bin:
    """Pairs of one range: how often the better answer scored higher, and how often it should."""

    low: float
    high: float
    pairs: int
    accuracy: float  # ties half
    expected: float  # mean of sigma(|delta r|)


@dataclass(frozen=True)
class Calibration:
    """A reward model on M pairs of a better and a worse answer."""

    pairs: int
    accuracy: float  # ties half
    log_loss: float  # -mean log sigma(r_better - r_worse), nats
    bins: tuple[Bin, ...]  # by |delta r|, as many pairs in each
    length_bins: tuple[Bin, ...]  # by tokens of the better minus tokens of the worse answer
    always_longer_accuracy: float  # of "the longer answer is better", ties half


def ceiling(agreement: float) -> tuple[float, float]:
    """Band of the accuracy that a perfect model has on labels whose two makers agree at rate a.

    [a, (1 + sqrt(2a - 1))/2]: the upper end where the noise is the same on all pairs, the lower
    where pairs are either certain or a coin toss.

    >>> [round(x, 3) for x in ceiling(0.82)]
    [0.82, 0.9]
    """
    if not 0.5 <= agreement <= 1.0:
        raise ValueError(f"ceiling: agreement {agreement}; it must lie in [0.5, 1]")
    return agreement, (1 + (2 * agreement - 1) ** 0.5) / 2


def calibrate(
    better: Sequence[float],
    worse: Sequence[float],
    better_lengths: Sequence[int],
    worse_lengths: Sequence[int],
    bins: int = 5,
) -> Calibration:
    """Calibration from the scores and lengths of each pair's two answers, [M] each."""
    if not better:
        raise ValueError("calibrate: no pairs")
    delta = np.asarray(better, dtype=np.float64) - np.asarray(worse, dtype=np.float64)
    longer = np.asarray(better_lengths, dtype=np.float64) - np.asarray(worse_lengths)
    right = _wins(delta)
    return Calibration(
        pairs=len(delta),
        accuracy=float(right.mean()),
        log_loss=float(np.logaddexp(0.0, -delta).mean()),
        bins=_bins(np.abs(delta), right, delta, bins),
        length_bins=_bins(longer, right, delta, bins),
        always_longer_accuracy=float(_wins(longer).mean()),
    )


def _wins(difference: Array) -> Array:
    return (1 + np.sign(difference)) / 2


def _bins(key: Array, right: Array, delta: Array, count: int) -> tuple[Bin, ...]:
    parts = np.array_split(np.argsort(key, kind="stable"), count)
    return tuple(
        Bin(
            low=float(key[part[0]]),
            high=float(key[part[-1]]),
            pairs=len(part),
            accuracy=float(right[part].mean()),
            expected=float((1 / (1 + np.exp(-np.abs(delta[part])))).mean()),
        )
        for part in parts
        if len(part)
    )
