"""Every two ways on the same prompts: difference, win rate, win rate at equal length, p-values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray

from prefloop.evaluation.comparison import PairVerdict
from prefloop.evaluation.length_control import Duels, length_controlled
from prefloop.intervals import Grouped, Interval, estimate, holm

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """A way's answers by run, by prompt and by sample: the judge's scores, and tokens."""

    name: str
    scores: Sequence[Grouped]
    lengths: Sequence[Grouped]


def run_means(scores: Sequence[Grouped]) -> Floats:
    """[S, N]: the mean score of each run's answers to each prompt."""
    return np.array([[sum(row) / len(row) for row in run] for run in scores])


def mean_of_runs(scores: Sequence[Grouped], seed: int = 0) -> Interval:
    """Mean over prompts and runs of a way."""
    means = run_means(scores)
    return estimate(means.mean(axis=0), seed, [means]).interval()


def win_rate_of_runs(first: Scored, second: Scored) -> Interval:
    """Share of answers scored above the other way's to the same prompt, ties half."""
    return _win_rate(duels_of(first, second))


def _win_rate(duels: Duels) -> Interval:
    runs = duels.by_run(duels.weights * duels.wins)
    values = runs[0].mean(axis=0)
    return estimate(values, runs=runs, resamples=0).share(len(values))


def duels_of(first: Scored, second: Scored) -> Duels:
    """Every answer of one way against every one of the other's to the same prompt."""
    rows = []
    for (i, own), (j, other) in product(enumerate(first.scores), enumerate(second.scores)):
        for prompt, (a, b) in enumerate(zip(own, other, strict=True)):
            weight = 1 / (len(a) * len(b) * len(first.scores) * len(second.scores))
            lengths = first.lengths[i][prompt], second.lengths[j][prompt]
            for (x, m), (y, n) in product(
                zip(a, lengths[0], strict=True), zip(b, lengths[1], strict=True)
            ):
                rows.append(((x > y) + 0.5 * (x == y), m - n, weight, prompt, i, j))
    wins, differences, weights, prompts, one, two = (np.array(x) for x in zip(*rows, strict=True))
    return Duels(wins, differences.astype(np.float64), prompts, weights, one, two)


def all_pairs(ways: Sequence[Scored], seed: int = 0) -> tuple[PairVerdict, ...]:
    """The verdict on every two ways, first named first; p-values by Holm over all of them."""
    found = [_pair(first, second, seed) for first, second in combinations(ways, 2)]
    adjusted = holm([pair.p for pair in found])
    return tuple(replace(pair, p_holm=p) for pair, p in zip(found, adjusted, strict=True))


def _pair(first: Scored, second: Scored, seed: int) -> PairVerdict:
    duels = duels_of(first, second)
    own, other = run_means(first.scores), run_means(second.scores)
    difference = estimate(own.mean(axis=0) - other.mean(axis=0), seed, (own, other))
    return PairVerdict(
        first=first.name,
        second=second.name,
        difference=difference.interval(),
        p=difference.p(),
        p_holm=1.0,
        win_rate=_win_rate(duels),
        length_controlled=length_controlled(duels),
    )
