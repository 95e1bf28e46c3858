"""Shares, strengths and numbers needed, by hand, by choix, and by simulation."""

import json
from math import erfc, log, sqrt
from pathlib import Path

import numpy as np
import pytest

from prefloop.evaluation.preferences import (
    Judged,
    clustered_variance,
    judgements_needed,
    share,
    strengths,
)


def same(values):
    return np.zeros(len(values), dtype=np.int64)


def test_variance_of_two_way_clusters_by_hand():
    """Two prompts and two labellers, influences 1, 2 | 3, -6.

    Prompts: 2/1 (3^2 + 3^2) = 36; labellers: 2 (4^2 + 4^2) = 64; each cell alone:
    4/3 (1 + 4 + 9 + 36) = 200/3. Together 36 + 64 - 200/3 = 100/3, below the last.
    """
    influence = np.array([[1.0], [2.0], [3.0], [-6.0]])
    prompts, labellers = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    assert clustered_variance(influence, prompts, labellers)[0] == pytest.approx(200 / 3)
    # Labellers who differ: 5, 5 | -5, -5 by labeller: prompts 0, cells 4/3 100, labellers 2 200.
    influence = np.array([[5.0], [-5.0], [5.0], [-5.0]])
    assert clustered_variance(influence, prompts, labellers)[0] == pytest.approx(400 - 400 / 3)
    assert clustered_variance(influence, prompts, same(prompts))[0] == pytest.approx(400 / 3)


def test_share_of_independent_judgements_is_wilsons():
    """60 of 100, each its own prompt: V = .24/99, so Wilson's interval of 99 tosses."""
    scores = np.array([1.0] * 60 + [0.0] * 40)
    found = share(scores, np.arange(100), same(scores))
    z = 1.959963984540054
    middle, half = 0.6 + z**2 / 198, z * sqrt(0.24 / 99 + z**2 / (4 * 99**2))
    assert found.interval.low == pytest.approx((middle - half) / (1 + z**2 / 99))
    assert found.interval.high == pytest.approx((middle + half) / (1 + z**2 / 99))
    assert found.p == pytest.approx(erfc(0.1 * sqrt(2 * 99)))
    assert found.design == pytest.approx(100 / 99)


def test_a_prompt_judged_again_and_again_counts_little_more_than_once():
    scores = np.array([1.0] * 60 + [0.0] * 40)
    prompts = np.arange(100)
    once = share(scores, prompts, same(scores))
    four = share(np.tile(scores, 4), np.tile(prompts, 4), np.repeat(np.arange(4), 100))
    assert four.interval.low == pytest.approx(once.interval.low)
    assert four.design == pytest.approx(4 * 100 / 99)


def test_ties_tell_more_than_tosses_do():
    """Half ties: V = 1/8 / 39, half of a coin's, so 2 x 39 tosses."""
    scores = np.array([1.0, 0.5, 0.5, 0.0] * 10)
    assert share(scores, np.arange(40), same(scores)).design == pytest.approx(40 / 78)


@pytest.mark.parametrize(("score", "low", "high"), [(1.0, 0.51, 1.0), (0.5, 0.15, 0.85)])
def test_verdicts_all_alike_are_not_certain(score, low, high):
    """Four prompts, eight judgements: four tosses. Wilson: z^2 = 3.84; 1/(1 + .96) = .51."""
    found = share(np.full(8, score), np.repeat(np.arange(4), 2), np.tile([0, 1], 4))
    assert found.interval.low == pytest.approx(low, abs=0.01)
    assert found.interval.high == pytest.approx(high, abs=0.01)


def test_needed_by_hand():
    """(1.96/2 + .8416 sqrt(.21))^2 / .04 = 46.6, twice that by the design."""
    assert judgements_needed(0.7, 1.0) == 47
    assert judgements_needed(0.3, 2.0) == 94
    assert judgements_needed(0.5, 1.0) is None


def table(rows):
    first, second, scores = zip(*rows, strict=True)
    count = np.arange(len(rows))
    return Judged(np.array(first), np.array(second), np.array(scores), count, same(count))


def test_strength_of_two_is_the_log_odds():
    """30 wins, 10 ties, 20 losses, and the tie that is added: 35.5 against 25.5."""
    rows = [(0, 1, s) for s in [0.0] * 30 + [0.5] * 10 + [1.0] * 20]
    first, second = strengths(table(rows), 2)
    assert (first.mean, first.low, first.high) == (0.0, 0.0, 0.0)
    assert second.mean == pytest.approx(log(35.5 / 25.5))
    # The delta method with 61 judgements' information p(1 - p) and 60 that vary.
    p = 35.5 / 61
    scores = np.array([s for *_, s in rows])
    spread = sqrt(((1 - scores - p) ** 2).sum() * 60 / 59) / (61 * p * (1 - p))
    assert second.high - second.mean == pytest.approx(1.959964 * spread)


def test_who_always_wins_has_a_finite_strength():
    _, second = strengths(table([(0, 1, 0.0)] * 12), 2)
    assert second.mean == pytest.approx(log(12.5 / 0.5))


def test_strengths_of_those_whom_nothing_joins_are_not_told():
    rows = [(0, 1, 1.0), (0, 1, 0.0), (2, 3, 1.0)]
    assert [one is None for one in strengths(table(rows), 4)] == [False, False, True, True]
    assert [one is None for one in strengths(table([(1, 2, 1.0)]), 3)] == [False, True, True]


def test_strengths_are_choixs():
    """choix 0.4.1 on the same judgements, a tie as a win for each, everything counted twice."""
    told = json.loads(Path(__file__).with_name("bradley_terry.json").read_text())
    for case in told:
        found = strengths(table(case["rows"]), case["ways"])
        assert [one.mean for one in found] == pytest.approx(case["strengths"], abs=1e-6)


# --- simulated -----------------------------------------------------------------------------------


def simulate(rng, prompts, per_prompt, people, lift, taste, likes=0.0, ties=0.0):
    """(scores, prompts, labellers): log-odds lift, a prompt's own, and a labeller's own."""
    own = rng.normal(0, taste, prompts)
    leaning = rng.normal(0, likes, people)
    where = np.repeat(np.arange(prompts), per_prompt)
    who = (where * 7 + np.tile(np.arange(per_prompt), prompts)) % people
    p = 1 / (1 + np.exp(-(lift + own[where] + leaning[who])))
    scores = (rng.random(len(where)) < p).astype(float)
    scores[rng.random(len(where)) < ties] = 0.5
    return scores, where, who


def truth(lift, spread, ties=0.0):
    draws = lift + spread * np.random.default_rng(0).normal(size=400_000)
    return 0.5 * ties + (1 - ties) * float((1 / (1 + np.exp(-draws))).mean())


@pytest.mark.parametrize(
    ("people", "likes", "taste", "ties"),
    [(1, 0.0, 0.0, 0.0), (3, 0.0, 1.5, 0.2), (10, 0.6, 1.0, 0.1)],
)
def test_intervals_hold_the_truth(people, likes, taste, ties):
    """19 of 20; with ten labellers of different taste a little less, as with few clusters."""
    rng = np.random.default_rng(1)
    right = truth(0.5, sqrt(taste**2 + likes**2), ties)
    held = 0
    for _ in range(1000):
        found = share(*simulate(rng, 80, min(people, 3), people, 0.5, taste, likes, ties)).interval
        held += found.low <= right <= found.high
    assert 0.9 <= held / 1000 <= 0.985


@pytest.mark.parametrize(("taste", "per_prompt", "ties"), [(0.0, 1, 0.0), (1.5, 2, 0.2)])
def test_the_number_needed_tells_two_apart_in_four_of_five(taste, per_prompt, ties):
    rng = np.random.default_rng(2)
    pilot = share(*simulate(rng, 20_000, per_prompt, 1, 0.45, taste, 0.0, ties))
    needed = judgements_needed(pilot.interval.mean, pilot.design)
    drawn = [
        share(*simulate(rng, round(needed / per_prompt), per_prompt, 1, 0.45, taste, 0.0, ties))
        for _ in range(1500)
    ]
    assert sum(one.p < 0.05 for one in drawn) / 1500 == pytest.approx(0.8, abs=0.04)
