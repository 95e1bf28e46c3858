"""What many judgements between ways say: shares, strengths, and how many more it would take.

Pure functions in NumPy, over rows of judgements. Those of one prompt hang together, and so do those
of one labeller: variances are sums over such clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, erfc, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from prefloop.intervals import Interval

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Share:
    """How often one of two was preferred, ties half."""

    interval: Interval  # 95 %
    p: float  # two-sided, that the share is 1/2
    design: float  # judgements that tell as much as one coin toss does; prompts as clusters


def clustered_variance(influence: Floats, prompts: Ints, labellers: Ints) -> Floats:
    """Variance of estimates [K] from each row's influence on them [N, K].

    Two-way clusters, V_prompt + V_labeller - V_both (Cameron, Gelbach and Miller 2011, eq. 2.11),
    each with the factor G/(G - 1) of its G clusters; with one labeller V_prompt alone. Never below
    V_prompt, nor below that of rows that have nothing to do with each other.
    """
    least = np.maximum(_between(influence, prompts), _between(influence, np.arange(len(prompts))))
    if len(np.unique(labellers)) < 2:
        return least
    both = prompts * (int(labellers.max()) + 1) + labellers
    two_way = (
        _between(influence, prompts) + _between(influence, labellers) - _between(influence, both)
    )
    larger: Floats = np.maximum(least, two_way)
    return larger


def _between(influence: Floats, groups: Ints) -> Floats:
    """Sum over clusters of the square of their summed influence, times G/(G - 1)."""
    _, index = np.unique(groups, return_inverse=True)
    count = int(index.max()) + 1
    sums = np.zeros((count, influence.shape[1]))
    np.add.at(sums, index, influence)
    variance: Floats = (sums**2).sum(axis=0) * count / max(count - 1, 1)
    return variance


def share(scores: Floats, prompts: Ints, labellers: Ints) -> Share:
    """Mean of scores [N] (1 preferred, 1/2 tied, 0 not) with Wilson's interval.

    The interval is taken at the effective size p(1 - p)/V, V the clustered variance (Dean and
    Pagano 2015, Journal of Survey Statistics and Methodology 3(4)). Where all scores are equal
    there is no V, and each prompt counts once.
    """
    n, p = len(scores), float(scores.mean())
    influence = ((scores - p) / n)[:, None]
    alone = np.zeros_like(labellers)
    variance, by_prompt = (
        float(clustered_variance(influence, prompts, who)[0]) for who in (labellers, alone)
    )
    tosses = p * (1 - p)
    count = len(np.unique(prompts))
    size = tosses / variance if variance > 0 else count
    design = n * by_prompt / tosses if variance > 0 else n / count
    return Share(_wilson(p, size), erfc(abs(p - 0.5) * sqrt(2 * size)), design)


def _wilson(p: float, n: float) -> Interval:
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return Interval(p, max(0.0, middle - half), min(1.0, middle + half))


def judgements_needed(p: float, design: float, power: float = 0.8) -> int | None:
    """Judgements that tell a share p from 1/2 at the 5 % level with this probability.

    design ((z_{.975}/2 + z_power sqrt(p(1 - p)))/(p - 1/2))^2: the normal approximation for one
    proportion (Fleiss, Levin and Paik 2003) times Kish's design effect. None where p is 1/2.

    >>> judgements_needed(0.6, 1.0)
    194
    """
    if p == 0.5:
        return None
    reach = Z / 2 + NormalDist().inv_cdf(power) * sqrt(p * (1 - p))
    return ceil(design * (reach / (p - 0.5)) ** 2)


@dataclass(frozen=True)
class Judged:
    """Judgements between two ways each; one row a judgement and pair."""

    first: Ints  # number of a way
    second: Ints
    scores: Floats  # 1 the first was preferred, 1/2 neither, 0 the second
    prompts: Ints
    labellers: Ints


def strengths(judged: Judged, ways: int) -> list[Interval | None]:
    """Bradley-Terry strengths of ways, in log-odds of being preferred to way 0, which has 0.

    P(i before j) = sigmoid(s_i - s_j) (Bradley and Terry 1952), a tie half a win for each, by
    maximum likelihood with one tie added to every pair that was compared: so they are finite where
    one always won. 95 % intervals from the clustered variance (`clustered_variance`) of the
    likelihood's scores. None for a way that no chain of judgements joins to way 0.
    """
    found: list[Interval | None] = [Interval(0.0, 0.0, 0.0), *[None] * (ways - 1)]
    pairs = np.unique(np.stack([judged.first, judged.second], axis=1), axis=0)
    joined = _joined(pairs, ways)
    free = np.flatnonzero(joined)[1:]
    if not len(free):
        return found
    rows = joined[judged.first]
    contrast = _contrast(judged.first, judged.second, ways)[rows]
    pairs = pairs[joined[pairs[:, 0]]]
    pseudo = _contrast(pairs[:, 0], pairs[:, 1], ways)
    design = np.concatenate([contrast, pseudo])
    scores = np.concatenate([judged.scores[rows], np.full(len(pseudo), 0.5)])
    fitted, information = _logistic(design[:, free], scores)
    wrong = scores[: len(contrast)] - _sigmoid(contrast[:, free] @ fitted)
    influence = wrong[:, None] * contrast[:, free] @ np.linalg.inv(information)
    variance = clustered_variance(influence, judged.prompts[rows], judged.labellers[rows])
    for way, value, wide in zip(
        free, fitted.tolist(), (Z * np.sqrt(variance)).tolist(), strict=True
    ):
        found[way] = Interval(value, value - wide, value + wide)
    return found


def _joined(pairs: Ints, ways: int) -> NDArray[np.bool_]:
    """Which ways a chain of pairs joins to way 0."""
    joined = np.zeros(ways, dtype=bool)
    joined[0] = True
    for _ in range(ways):
        joined[pairs[joined[pairs].any(axis=1)]] = True
    return joined


def _contrast(first: Ints, second: Ints, ways: int) -> Floats:
    """[N, ways]: 1 for the first, -1 for the second."""
    rows = np.zeros((len(first), ways))
    rows[np.arange(len(first)), first] += 1
    rows[np.arange(len(first)), second] -= 1
    return rows


def _sigmoid(x: Floats) -> Floats:
    value: Floats = 1 / (1 + np.exp(-x))
    return value


def _logistic(design: Floats, scores: Floats) -> tuple[Floats, Floats]:
    """Logistic regression without intercept by Newton's method: (coefficients, information)."""
    value = np.zeros(design.shape[1])
    while True:
        p = _sigmoid(design @ value)
        information = (design * (p * (1 - p))[:, None]).T @ design
        step = np.linalg.solve(information, design.T @ (scores - p))
        value = value + step / max(1.0, float(np.abs(step).max(initial=0.0)))  # of 1 at most
        if float(np.abs(step).max(initial=0.0)) < 1e-10:
            return value, information
