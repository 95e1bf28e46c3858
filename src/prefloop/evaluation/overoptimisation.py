"""How the gold reward goes while a proxy of it is optimised: fits, the peak, the fall from it.

Gao et al. (arXiv 2210.10760, section 1): with d = sqrt(KL from the start, in nats an answer), a
reward is R(d) = d (alpha - beta log d) over training by RL, and R(d) = d (alpha - beta d) for the
best of n. They set R(0) to 0; here it is fitted too, as `start`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefloop.errors import UserError
from prefloop.files import read_rows
from prefloop.intervals import Grouped, Interval

Floats = NDArray[np.float64]
Form = Literal["rl", "best-of-n"]
Reward = Literal["proxy", "gold"]
RESAMPLES = 1000
NORMAL_97_5 = 1.959964  # standard errors to each side of a 95 % interval
WINDOWS = 12
"""Parts of a run between which a peak is looked for."""


@dataclass(frozen=True)
class Point:
    """What was measured at one moment of a run, or for one n of best-of-n."""

    kl: float  # from the start, in nats an answer
    proxy: float  # mean score of the optimised reward
    gold: float  # mean score of what it stands for
    error: float  # standard error of `gold`


@dataclass(frozen=True)
class Curve:
    """A fitted form of Gao et al., with the reward at d = 0."""

    form: Form
    start: float
    alpha: float
    beta: float

    def at(self, kl: float) -> float:
        """The reward at a KL divergence in nats.

        >>> Curve("best-of-n", 1.0, 2.0, 0.5).at(4.0)
        3.0
        """
        d, bend = _terms(kl, self.form)
        return self.start + self.alpha * d + self.beta * bend

    @property
    def peak_kl(self) -> float | None:
        """Where the reward is highest; None where it rises (or falls) all along.

        RL: dR/dd = alpha - beta - beta log d = 0; best-of-n: alpha - 2 beta d = 0.
        """
        if self.beta <= 0:
            return None
        if self.form == "rl":
            exponent = 2 * (self.alpha / self.beta - 1)
            return exp(exponent) if exponent < 50 else None
        return (self.alpha / (2 * self.beta)) ** 2 if self.alpha > 0 else None


@dataclass(frozen=True)
class Fit:
    """A curve with 95 % percentile-bootstrap intervals of its numbers."""

    curve: Curve
    alpha: Interval
    beta: Interval
    peak_kl: Interval | None  # over the draws that have a peak; None where the curve has none
    peaked: float  # share of the draws that have one within the KL that was seen


@dataclass(frozen=True)
class Fall:
    """From the peak of the gold reward, in the points of one run, to the run's end."""

    kl: float  # at the peak, nats
    peak: float
    last: float
    error: float  # standard error of peak - last

    @property
    def standard_errors(self) -> float:
        """How many of them gold fell by; 0 where the end is the peak."""
        return (self.peak - self.last) / self.error if self.error else 0.0


def points_of_run(directory: Path) -> list[Point]:
    """Of a PPO run with --monitor: the monitor's score against the training reward and KL.

    KL and reward are those of the monitor's line, or else of the newest iteration before it.
    """
    points: list[Point] = []
    known: dict[str, float] = {}
    for _, line in read_rows(directory / "metrics.jsonl"):
        known |= {name: value for name, value in line.items() if value is not None}
        if line.get("monitor/score") is None:
            continue
        kl = known.get("objective/kl") if line.get("monitor/kl") is None else line["monitor/kl"]
        if kl is None or "objective/scores" not in known:
            raise UserError(f"{directory}: its metrics tell no KL or no score; name a --ref-model")
        error = (known["monitor/high"] - known["monitor/low"]) / (2 * NORMAL_97_5)
        points.append(Point(kl, known["objective/scores"], line["monitor/score"], error))
    if not points:
        raise UserError(f"{directory}: no monitor/score in its metrics; train with --monitor")
    return points


def fit(points: Sequence[Point], form: Form, of: Reward) -> Curve:
    """Least squares over the points; they are linear in start, alpha and beta."""
    if len({point.kl for point in points}) < 3:
        raise ValueError(f"fit: {len(points)} points; three of different KL are needed")
    terms = [(1.0, *_terms(point.kl, form)) for point in points]
    rewards = [getattr(point, of) for point in points]
    found = np.linalg.lstsq(np.array(terms), np.array(rewards), rcond=None)[0]
    return Curve(form, *map(float, found))


def _terms(kl: float, form: Form) -> tuple[float, float]:
    """What alpha and beta are multiplied by; a sampled KL may lie a little below 0."""
    d = sqrt(max(kl, 0.0))
    if form == "best-of-n":
        return d, -d * d
    return d, -d * log(d) if d else 0.0


class Resamples(NamedTuple):
    """B resamples of N points."""

    weights: Floats  # [B, N] how often each point is in
    proxy: Floats  # [B, N]
    gold: Floats  # [B, N]


Draw = Callable[[np.random.Generator, int], Resamples]
"""Draws so many resamples of the points of a fit."""


def draw_runs(runs: Sequence[Sequence[Point]]) -> Draw:
    """Runs are drawn again, and of each that is drawn its points: over seeds and answers.

    The points of the fit are those of all runs, in order.
    """
    every = [point for run in runs for point in run]

    def draw(rng: np.random.Generator, count: int) -> Resamples:
        times = rng.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), count)  # [B, runs]
        parts = [
            rng.multinomial(times[:, i] * len(run), np.full(len(run), 1 / len(run)))
            for i, run in enumerate(runs)
        ]
        rewards = (np.array([[getattr(p, of) for p in every]]) for of in ("proxy", "gold"))
        weights = np.concatenate(parts, axis=1).astype(float)
        return Resamples(weights, *(np.broadcast_to(r, weights.shape) for r in rewards))

    return draw


def draw_prompts(proxy: Grouped | Floats, gold: Grouped | Floats) -> Draw:
    """Prompts are drawn again: proxy and gold [n, prompts] of the best of each n.

    The points of the fit are one for each n, in order: the means over prompts.
    """
    prompts = len(proxy[0])

    def draw(rng: np.random.Generator, count: int) -> Resamples:
        times = rng.multinomial(prompts, np.full(prompts, 1 / prompts), count) / prompts
        means = [times @ np.asarray(scores).T for scores in (proxy, gold)]
        return Resamples(np.ones_like(means[0]), *means)

    return draw


def fit_with_intervals(
    points: Sequence[Point],
    form: Form,
    of: Reward,
    draw: Draw,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Fit:
    """The fit to the points, and how it varies over resamples of them."""
    curve = fit(points, form, of)
    drawn = draw(np.random.default_rng(seed), resamples)
    terms = np.array([(1.0, *_terms(point.kl, form)) for point in points])
    squares = np.einsum("bn,ni,nj->bij", drawn.weights, terms, terms)
    products = np.einsum("bn,ni,bn->bi", drawn.weights, terms, getattr(drawn, of))
    found = np.einsum("bij,bj->bi", np.linalg.pinv(squares, hermitian=True), products)
    curves = [Curve(form, *map(float, row)) for row in found]
    farthest = max(point.kl for point in points)
    peaks = [c.peak_kl for c in curves if c.peak_kl is not None]
    return Fit(
        curve,
        _interval(curve.alpha, [c.alpha for c in curves]),
        _interval(curve.beta, [c.beta for c in curves]),
        None if curve.peak_kl is None else _interval(curve.peak_kl, peaks),
        sum(peak <= farthest for peak in peaks) / len(curves),
    )


def _interval(value: float, draws: Sequence[float]) -> Interval:
    low, high = np.quantile(draws, [0.025, 0.975]) if draws else (value, value)
    return Interval(value, float(low), float(high))


def windows(points: Sequence[Point], count: int = WINDOWS) -> list[Point]:
    """The points in order, in `count` parts of equal size (to one), each part their mean."""
    parts = np.array_split(np.arange(len(points)), min(count, len(points)))
    return [_mean([points[i] for i in part]) for part in parts]


def _mean(points: Sequence[Point]) -> Point:
    n = len(points)
    kl, proxy, gold = (sum(getattr(p, k) for p in points) / n for k in ("kl", "proxy", "gold"))
    return Point(kl, proxy, gold, sqrt(sum(p.error**2 for p in points)) / n)


def fall(points: Sequence[Point], count: int = WINDOWS) -> Fall:
    """How far gold fell from its peak by the end of a run, whose points are in order.

    The highest of several noisy means is too high by its choice. So every second point of each
    window chooses the peak, and the others measure it.
    """
    parts = np.array_split(np.arange(len(points)), min(count, len(points) // 2))
    if not parts:
        raise ValueError("fall: fewer than two points")
    halves = [[_mean([points[i] for i in part[k::2]]) for part in parts] for k in (0, 1)]
    at = max(range(len(parts)), key=lambda i: halves[0][i].gold)
    last = _mean([points[i] for i in parts[-1]])
    if at == len(parts) - 1:
        return Fall(last.kl, last.gold, last.gold, 0.0)
    peak = halves[1][at]
    return Fall(peak.kl, peak.gold, last.gold, sqrt(peak.error**2 + last.error**2))
