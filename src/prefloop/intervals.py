"""Means and shares over prompts, with intervals that hold at few prompts and for several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp, inf, lgamma, pi, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Grouped = Sequence[Sequence[float]]
"""One number an answer, in one list a prompt."""
RESAMPLES = 4000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:z.2f} [{self.low:z.2f}, {self.high:z.2f}]"

    def above(self, other: Interval) -> bool:
        """Whether this interval lies wholly above the other."""
        return self.low > other.high


def complement(share: Interval) -> Interval:
    """One minus a share."""
    return Interval(1 - share.mean, 1 - share.high, 1 - share.low)


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts, its standard error, and what the error is read by."""

    mean: float
    error: float  # 0 where the values do not vary
    df: float  # degrees of freedom of the error; 0 for one prompt
    resampled: Floats  # |t*| of resampled prompts, ascending; empty where nothing was resampled

    @cached_property
    def reach(self) -> float:
        """Standard errors between the mean and each end of its interval.

        The larger of Student's quantile, which is too short where scores are skewed, and that of
        |t*| (the symmetric studentised bootstrap: Hall, The Annals of Statistics 16, 1988), which
        is too short where few values differ.
        """
        if self.error == 0.0:
            return 0.0
        index = int(np.ceil(LEVEL * (len(self.resampled) + 1))) - 1
        known = index < len(self.resampled)
        return max(t_quantile(self.df), float(self.resampled[index]) if known else 0.0)

    def interval(self) -> Interval:
        """The mean with its interval; one prompt alone gives one without width."""
        half = self.reach * self.error
        return Interval(self.mean, self.mean - half, self.mean + half)

    def answers(self, prompts: int) -> float:
        """How many independent yes-or-no answers would have a share's standard error: p(1 - p)/e^2.

        Where all prompts say yes, or all no, the prompts' number; infinite where all say the same
        in between.
        """
        p = min(max(self.mean, 0.0), 1.0)
        if self.error > 0.0:
            return p * (1 - p) / self.error**2
        return inf if 0.0 < p < 1.0 else float(prompts)

    def share(self, prompts: int, most: float = inf) -> Interval:
        """The interval of a mean of shares, which ends within [0, 1].

        Wilson's score interval (JASA 22, 1927, 209-212) at the effective number of `answers` (Korn
        and Graubard, Survey Methodology 24, 1998, 193-201), or at `most` if that is less, with
        Student's quantile where the error was estimated.
        """
        p = min(max(self.mean, 0.0), 1.0)
        number = min(self.answers(prompts), most)
        if number == inf:
            return Interval(self.mean, self.mean, self.mean)
        if number == 0.0:  # a linearised share of 0 or 1 with an error
            return self.interval()
        normal = NormalDist().inv_cdf((1 + LEVEL) / 2)
        reach = t_quantile(self.df) if self.error > 0.0 else normal
        scale = 1 + reach**2 / number
        centre = (p + reach**2 / (2 * number)) / scale
        half = reach / scale * sqrt(p * (1 - p) / number + reach**2 / (4 * number**2))
        return Interval(self.mean, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))

    def p(self, null: float = 0.0) -> float:
        """Two-sided p-value of the mean being `null`: below 0.05 where the interval leaves it out.

        The larger of Student's and the share of resamples with as large a |t*|, this one among
        them; where none is as large, Student's. Where the values do not vary, that of the sign
        test, 2^(1 - N).
        """
        if self.error == 0.0:
            return 1.0 if self.mean == null else 2.0**-self.df
        t = abs(self.mean - null) / self.error
        beyond = len(self.resampled) - int(np.searchsorted(self.resampled, t))
        resampled = (1 + beyond) / (1 + len(self.resampled)) if beyond else 0.0
        return max(two_sided_p(t, self.df), resampled)


def estimate(
    values: Sequence[float] | Floats,
    seed: int = 0,
    runs: Sequence[Floats] = (),
    resamples: int = RESAMPLES,
) -> Estimate:
    """The mean of one value a prompt [N], of prompts drawn from many.

    `runs` holds, for each of the ways that `values` compares, its values by run and prompt [S, N]:
    where a way was trained with several seeds (S > 1), its runs are taken for a draw from many,
    too. The variance of the mean is then s^2/N over prompts and, for each such way,
    max(0, MS_runs - MS_rest)/(N S) over runs (crossed random effects; Searle, Casella and
    McCulloch, Variance Components, 1992, chapter 4), with Satterthwaite's degrees of freedom
    (Biometrics Bulletin 2, 1946): a bootstrap over three runs would see too little of their spread.
    They are at least S - 1 of the way with the fewest runs: the difference of two mean squares that
    are nearly equal would have next to none.
    """
    array: Floats = np.asarray(values, dtype=np.float64)
    size = len(array)
    if not size:
        raise ValueError("estimate: no values; at least one prompt is needed")
    mean = float(array.mean())
    centred = array - mean
    if size == 1 or float(np.abs(centred).max()) <= 1e-12 * max(1.0, abs(mean)):
        variance, below = 0.0, 0.0
    else:
        variance = float(centred @ centred) / (size - 1) / size
        below = variance**2 / (size - 1)
    fewest = inf  # degrees of freedom of a way's runs
    for way in runs:
        count = len(way)
        if count < 2 or size < 2:
            continue
        by_run = way.mean(axis=1, keepdims=True)
        rest = way - by_run - way.mean(axis=0, keepdims=True) + way.mean()
        ms_runs = size * float(by_run.var(ddof=1))
        ms_rest = float((rest**2).sum()) / ((count - 1) * (size - 1))
        if ms_runs > ms_rest:
            fewest = min(fewest, count - 1)
            variance += (ms_runs - ms_rest) / (size * count)
            spread = ms_runs**2 + ms_rest**2 / (size - 1)
            below += spread / (count - 1) / (size * count) ** 2
    if variance == 0.0:
        return Estimate(mean, 0.0, float(size - 1), np.zeros(0))
    if fewest == inf:
        drawn = _studentised(centred, seed, resamples)
        return Estimate(mean, sqrt(variance), variance**2 / below, drawn)
    return Estimate(mean, sqrt(variance), max(variance**2 / below, fewest), np.zeros(0))


def _studentised(centred: Floats, seed: int, resamples: int) -> Floats:
    """|t*| = |mean*|/error* of resampled prompts, ascending, where the resample varies at all."""
    size = len(centred)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(size, np.full(size, 1 / size), size=resamples).astype(np.float64)
    means = draws @ centred / size
    variances = (draws @ centred**2 / size - means**2) / (size - 1)
    varies = variances > 1e-9 * float(centred @ centred) / size
    return np.sort(np.abs(means[varies]) / np.sqrt(variances[varies]))


def bootstrap(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean of one value a prompt; the interval comes from resampling prompts."""
    return estimate(values, seed, resamples=resamples).interval()


def mean_score(scores: Grouped, seed: int = 0) -> Interval:
    """Mean over prompts of a prompt's mean score; answers to one prompt are resampled together."""
    return bootstrap([sum(row) / len(row) for row in scores], seed)


# --- Student's t ---------------------------------------------------------------------------------

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(256)


def two_sided_p(t: float, df: float) -> float:
    """P(|T| >= |t|) for Student's T with `df` > 0 degrees of freedom, whole or not.

    With t = sqrt(df) tan(a), it is 2 C times the integral of cos^(df-1) from a to pi/2, where
    C = Gamma((df + 1)/2) / (sqrt(pi) Gamma(df/2)).

    >>> round(two_sided_p(2.228, 10), 4)
    0.05
    """
    if df > 1e5:
        return 2 * NormalDist().cdf(-abs(t))
    begin = float(np.arctan(abs(t) / sqrt(df))) if abs(t) < inf else pi / 2
    half = (pi / 2 - begin) / 2
    angles = begin + half * (1 + _NODES)
    scale = exp(lgamma((df + 1) / 2) - lgamma(df / 2)) / sqrt(pi)
    return min(1.0, 2 * scale * half * float(_WEIGHTS @ np.cos(angles) ** (df - 1)))


def t_quantile(df: float) -> float:
    """The t that 95 % of |T| lie below.

    >>> round(t_quantile(10), 3)
    2.228
    """
    low, high = 1.9, 2.0
    while two_sided_p(high, df) > 1 - LEVEL:
        high *= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, df) > 1 - LEVEL else (low, middle)
    return high


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being many (Holm, Scandinavian Journal of Statistics 6, 1979).

    The i-th smallest of m is multiplied by m - i + 1, and none may be below one before it.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, most = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        most = max(most, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = most
    return adjusted
