"""How far labellers agree: pure functions over ranks, in NumPy.

The ranks of an annotation are the tier of each answer, 0 for the best; equal ranks tie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import erfc, sqrt

import numpy as np
from numpy.typing import NDArray

from prefloop.intervals import Interval, estimate

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RESAMPLES = 400


def ranks_of(tiers: Sequence[Sequence[int]], answers: int) -> list[int]:
    """The tier of each answer.

    >>> ranks_of([[1], [3, 0], [2]], 4)
    [1, 0, 2, 1]
    """
    ranks = [0] * answers
    for rank, tier in enumerate(tiers):
        for answer in tier:
            ranks[answer] = rank
    return ranks


def pair_signs(ranks: Ints) -> Ints:
    """[n, K] ranks -> [n, K(K-1)/2]: 1 where the first of two answers is better, -1 worse, 0 tied.

    >>> pair_signs(np.array([[0, 1, 1]])).tolist()
    [[1, 1, 0]]
    """
    pairs = list(combinations(range(ranks.shape[1]), 2))
    first, second = [i for i, _ in pairs], [j for _, j in pairs]
    signs: Ints = np.sign(ranks[:, second] - ranks[:, first]).astype(np.int64)
    return signs


def pair_agreement(a: Ints, b: Ints) -> Floats:
    """Share of pairs that two rankings order alike, ties half: mean of 1 - |a - b|/2 over signs.

    A pair tied by both is agreed on, one tied by either counts half. [n, P], [n, P] -> [n].

    >>> pair_agreement(np.array([[1, 1, 0, 1]]), np.array([[1, -1, 0, 0]])).tolist()
    [0.625]
    """
    agreed: Floats = (1.0 - np.abs(a - b) / 2.0).mean(axis=1)
    return agreed


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


# --- Krippendorff's alpha ------------------------------------------------------------------------


def coincidences(counts: Ints) -> Floats:
    """[U, V] counts of each value in each unit -> [U, V, V] coincidences.

    A unit with m values counts each of its ordered pairs of values 1/(m - 1) times; one with fewer
    than two values counts nothing (Krippendorff, Content Analysis, 2004, chapter 11).
    """
    m = counts.sum(axis=1)
    weight = np.where(m > 1, 1.0 / np.maximum(m - 1, 1), 0.0)
    values = counts.shape[1]
    pairs = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(values)
    return np.asarray(pairs * weight[:, None, None], dtype=np.float64)


def alpha_of(coincidence: Floats) -> float:
    """Krippendorff's alpha for ordinal values from [V, V] coincidences; NaN without variation.

    alpha = 1 - D_o / D_e with the ordinal metric (sum_{g=c}^{k} n_g - (n_c + n_k)/2)^2.
    """
    n = coincidence.sum(axis=1)
    total = n.sum()
    before = np.cumsum(n) - n / 2  # mid-rank of each value
    distance = (before[:, None] - before[None, :]) ** 2
    expected = float((np.outer(n, n) * distance).sum())
    if expected == 0.0:
        return float("nan")
    return float(1.0 - (total - 1) * (coincidence * distance).sum() / expected)


def krippendorff_alpha(counts: Ints, prompts: Ints, seed: int = 0) -> Interval:
    """Alpha of [U, V] counts (a unit is an answer, a value its rank); prompts are resampled.

    `prompts` [U] names each unit's prompt: answers to one prompt are resampled together.
    """
    _, groups = np.unique(prompts, return_inverse=True)
    by_prompt = np.zeros((int(groups.max()) + 1, counts.shape[1] ** 2))
    for start in range(0, len(counts), 65_536):  # bounds the memory
        part = slice(start, start + 65_536)
        flat = coincidences(counts[part]).reshape(-1, counts.shape[1] ** 2)
        np.add.at(by_prompt, groups[part], flat)
    shape = (counts.shape[1], counts.shape[1])

    def alpha(weights: Floats) -> float:
        return alpha_of((weights @ by_prompt).reshape(shape))

    return bootstrap(alpha, len(by_prompt), seed)


def bootstrap(statistic: Callable[[Floats], float], size: int, seed: int) -> Interval:
    """A statistic of prompts' weights [size] (all 1), with its interval over resampled prompts."""
    rng = np.random.default_rng(seed)
    draws = [
        statistic(np.bincount(rng.integers(size, size=size), minlength=size).astype(np.float64))
        for _ in range(RESAMPLES)
    ]
    draws = [draw for draw in draws if np.isfinite(draw)]
    value = statistic(np.ones(size))
    low, high = np.quantile(draws, [0.025, 0.975]) if draws else (value, value)
    return Interval(value, float(low), float(high))


def mean_by_prompt(values: Floats, prompts: Ints, seed: int = 0) -> Interval:
    """Mean of `values`; those of one prompt are drawn together."""
    return estimate(_by_prompt(values, prompts), seed).interval()


def share_by_prompt(values: Floats, prompts: Ints) -> Interval:
    """Mean of `values` within [0, 1]; those of one prompt are drawn together."""
    by_prompt = _by_prompt(values, prompts)
    return estimate(by_prompt, resamples=0).share(len(by_prompt))


def _by_prompt(values: Floats, prompts: Ints) -> Floats:
    """One value a prompt, with the mean of `values` and its error.

    A prompt with n of them adds n/n_mean times what they differ from the mean: the linearised ratio
    of their sum and their number (Cochran, Sampling Techniques, 1977, section 6.4).
    """
    _, groups = np.unique(prompts, return_inverse=True)
    mean = float(values.mean())
    above, sizes = np.bincount(groups, values - mean), np.bincount(groups)
    linear: Floats = mean + above / sizes.mean()
    return linear


# --- Dawid-Skene ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class DawidSkene:
    """One-coin model: each labeller is right with one probability, and errs evenly otherwise."""

    accuracy: Floats  # [labellers]
    posterior: Floats  # [items, classes]


def one_coin(
    items: Ints, labellers: Ints, labels: Ints, classes: int, iterations: int = 50
) -> DawidSkene:
    """EM for the one-coin Dawid-Skene model (Zhang et al. 2016, arXiv 1406.3824).

    Label n says that labeller `labellers[n]` put item `items[n]` into class `labels[n]`. Starts
    from the shares of votes. Accuracies stay within [1e-10, 1 - 1e-10].
    """
    count, workers = int(items.max()) + 1, int(labellers.max()) + 1
    votes = np.zeros((count, classes))
    np.add.at(votes, (items, labels), 1.0)
    posterior = votes / votes.sum(axis=1, keepdims=True)
    given: Floats = np.bincount(labellers, minlength=workers).clip(1).astype(np.float64)
    right = np.zeros(workers)
    for _ in range(iterations):
        # M: how often each labeller is right, and how common each class is.
        agreed = posterior[items, labels]
        right = np.bincount(labellers, agreed, minlength=workers) / given
        right = np.clip(right, 1e-10, 1 - 1e-10)
        prior = posterior.mean(axis=0)
        # E: a vote multiplies its class by p against (1 - p)/(C - 1) for every other one.
        weight = np.log(right) - np.log((1 - right) / (classes - 1))
        score: Floats = np.tile(np.log(np.maximum(prior, 1e-300)), (count, 1))
        np.add.at(score, (items, labels), weight[labellers])
        score -= score.max(axis=1, keepdims=True)
        likelihood: Floats = np.exp(score)
        updated = likelihood / likelihood.sum(axis=1, keepdims=True)
        settled = bool(np.abs(updated - posterior).max() < 1e-9)
        posterior = updated
        if settled:
            break
    return DawidSkene(right, posterior)


# --- bias ----------------------------------------------------------------------------------------


def first_wins(ranks_as_shown: Ints) -> Floats:
    """Of each annotation, the share of pairs won by the answer shown earlier, ties half.

    The order shown is random, so without bias it is 1/2 in the mean whatever the answers are.
    """
    shares: Floats = (pair_signs(ranks_as_shown).mean(axis=1) + 1) / 2
    return shares


def share_test(shares: Floats) -> tuple[float, float]:
    """(mean, two-sided p-value of the z-test against 1/2: NaN for fewer than 2 shares)."""
    mean = float(shares.mean()) if len(shares) else float("nan")
    if len(shares) < 2:
        return mean, float("nan")
    spread = float(shares.std(ddof=1)) / sqrt(len(shares))
    if spread == 0.0:
        return mean, 1.0 if mean == 0.5 else 0.0
    return mean, erfc(abs(mean - 0.5) / spread / sqrt(2))


def copeland(signs: Sequence[float], answers: int) -> list[list[int]]:
    """Tiers by pairs won minus pairs lost, from a vote on each pair (above 0: the first wins).

    For two answers this is the (weighted) majority.

    >>> copeland([1.0, 2.0, 0.0], 3)
    [[0], [1, 2]]
    """
    score = [0.0] * answers
    for (i, j), vote in zip(combinations(range(answers), 2), signs, strict=True):
        sign = float(np.sign(round(vote, 9)))
        score[i] += sign
        score[j] -= sign
    return [[i for i, s in enumerate(score) if s == level] for level in sorted(set(score))[::-1]]
