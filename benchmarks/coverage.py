"""`python -m benchmarks coverage`: how often prefloop's 95 % intervals hold the truth.

Prompts are drawn from populations whose truth is known; each interval is made by the function that
the commands call. `Case` is one table row: coverage in percent at 30, 100 and 250 prompts, whose
own standard error is 0.5 at 2,000 draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefloop.evaluation.length_control import Duels, length_controlled
from prefloop.evaluation.winrate import win_rate
from prefloop.intervals import Interval, estimate
from prefloop.labelling.agreement import share_by_prompt

Floats = NDArray[np.float64]
Numbers = np.random.Generator
PROMPTS = (30, 100, 250)
DRAWS = 2000
RESAMPLES = 399  # of an interval; the commands draw ten times as many


class Case(NamedTuple):
    """An interval of n prompts, and the truth that it should hold."""

    name: str
    interval: Callable[[Numbers, int], Interval]
    truth: float


def covered(case: Case, prompts: int, draws: int = DRAWS) -> float:
    """Share of intervals that hold the truth."""
    rng = np.random.default_rng(prompts)
    found = [case.interval(rng, prompts) for _ in range(draws)]
    return sum(one.low <= case.truth <= one.high for one in found) / draws


def measure(dtype: str, threads: int) -> dict[str, Any]:
    """Coverage of every case, as a table and for the JSON."""
    del dtype, threads  # no model is run
    print("| interval | " + " | ".join(f"{n} prompts" for n in PROMPTS) + " |")
    print("|---|" + "---|" * len(PROMPTS))
    rows: dict[str, list[float]] = {}
    for case in CASES:
        rows[case.name] = [covered(case, n) for n in PROMPTS]
        print(f"| {case.name} | " + " | ".join(f"{x:.1%}" for x in rows[case.name]) + " |")
    return {"prompts": PROMPTS, "draws": DRAWS, "coverage": rows}


def _mean(values: Floats, runs: Sequence[Floats] = ()) -> Interval:
    return estimate(values, runs=runs, resamples=RESAMPLES).interval()


# --- populations ---------------------------------------------------------------------------------


def _paired(rng: Numbers, n: int) -> Interval:
    """Two ways on the same prompts, with skewed answers of their own."""
    asked = rng.normal(0, 2, n)
    return _mean(asked + rng.gamma(2, 1, n) - asked - rng.normal(1.5, 1, n))


def _rubric(rng: Numbers, n: int) -> Interval:
    return _mean(rng.choice([3.0, 5.0, 6.0, 7.0, 8.0, 9.0], n, p=RUBRIC))


RUBRIC = [0.05, 0.1, 0.15, 0.3, 0.3, 0.1]


def _won(win: float, tie: float) -> Case:
    def interval(rng: Numbers, n: int) -> Interval:
        scores = rng.choice([1.0, 0.5, 0.0], n, p=[win, tie, 1 - win - tie])
        return win_rate([[s] for s in scores], [[0.5]] * n)

    return Case(f"win rate {win + tie / 2:.3g}, ties {tie:.0%}", interval, win + tie / 2)


def _won_by_samples(rng: Numbers, n: int) -> Interval:
    """Four answers a prompt, which differ in how hard they are."""
    chance = rng.beta(2, 1, n)
    return win_rate([list((rng.random(4) < p) + 0.0) for p in chance], [[0.5]] * n)


def _at_equal_length(theta: float, phi: float) -> Case:
    def interval(rng: Numbers, n: int) -> Interval:
        d = rng.normal(20, 40, n)
        chance = 1 / (1 + np.exp(-(theta + phi * np.tanh(d / 40))))
        wins = (rng.random(n) < chance).astype(np.float64)
        zeros = np.zeros(n, dtype=np.int64)
        return length_controlled(Duels(wins, d, np.arange(n), np.ones(n), zeros, zeros))

    truth = float(1 / (1 + np.exp(-theta)))
    return Case(f"win rate at equal length {truth:.2f}", interval, truth)


def _runs(count: int, spread: float) -> Case:
    """Runs whose means differ by `spread` of a prompt's deviation."""

    def interval(rng: Numbers, n: int) -> Interval:
        asked, own = rng.normal(0, 1, n), rng.normal(0, spread, (count, 1))
        table = 1.0 + asked + own + rng.normal(0, 1, (count, n))
        return _mean(table.mean(axis=0), [table])

    return Case(f"mean of {count} runs, spread {spread:g}", interval, 1.0)


def _two_ways_of_runs(rng: Numbers, n: int) -> Interval:
    asked = rng.normal(0, 1, n)
    first, second = (
        asked + rng.normal(0, s, (3, 1)) + rng.normal(0, 1, (3, n)) for s in (0.3, 0.1)
    )
    return _mean(first.mean(axis=0) - second.mean(axis=0), [first, second])


def _agreed(rng: Numbers, n: int) -> tuple[Floats, NDArray[np.int64]]:
    """One to six pairs a prompt, agreed on with a chance of the prompt's own, 0.8 in the mean."""
    chance, sizes = rng.beta(4, 1, n), rng.integers(1, 7, n)
    prompts = np.repeat(np.arange(n), sizes)
    return (rng.random(len(prompts)) < chance[prompts]).astype(np.float64), prompts


CASES = (
    Case("mean, normal", lambda rng, n: _mean(rng.normal(0.3, 1, n)), 0.3),
    Case("mean, skewed (gamma, 2)", lambda rng, n: _mean(rng.gamma(2, 1, n)), 2.0),
    Case("mean, very skewed (exponential)", lambda rng, n: _mean(rng.exponential(1, n)), 1.0),
    Case("mean, an LLM's rubric", _rubric, float(np.dot(RUBRIC, [3, 5, 6, 7, 8, 9]))),
    Case("paired difference", _paired, 0.5),
    _won(0.5, 0.0),
    _won(0.55, 0.2),
    _won(0.8, 0.1),
    _won(0.9, 0.0),
    Case("win rate 0.667, four answers a prompt", _won_by_samples, 2 / 3),
    _at_equal_length(0.3, 1.0),
    _at_equal_length(1.2, 2.0),
    _runs(3, 0.5),
    _runs(3, 0.1),
    _runs(5, 0.2),
    Case("difference of two ways, 3 runs each", _two_ways_of_runs, 0.0),
    Case("agreement 0.8", lambda rng, n: share_by_prompt(*_agreed(rng, n)), 0.8),
)
