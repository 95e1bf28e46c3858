"""Every two ways: by hand, and against scipy and scikit-learn."""

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression

from prefloop.evaluation.length_control import RIDGE, Duels, fit, length_controlled
from prefloop.evaluation.pairs import Scored, all_pairs, duels_of, win_rate_of_runs
from prefloop.intervals import holm


def one_run(name: str, scores: list[float], lengths: list[float] | None = None) -> Scored:
    """One answer a prompt."""
    lengths = lengths or [10.0] * len(scores)
    return Scored(name, [[[s] for s in scores]], [[[n] for n in lengths]])


def test_every_pair_by_scipy() -> None:
    rng = np.random.default_rng(0)
    prompts = rng.normal(0, 2.0, 60)  # what the ways share is no part of their differences
    scores = {
        name: prompts + rng.normal(mean, 0.5, 60)
        for name, mean in (("SFT", 0.0), ("PPO", 0.15), ("DPO", 0.6))
    }
    found = all_pairs([one_run(name, list(s)) for name, s in scores.items()])
    assert [(v.first, v.second) for v in found] == [("SFT", "PPO"), ("SFT", "DPO"), ("PPO", "DPO")]
    for v in found:
        scipys = stats.ttest_rel(scores[v.first], scores[v.second])
        assert v.difference.mean == pytest.approx(np.mean(scores[v.first] - scores[v.second]))
        low, high = scipys.confidence_interval()
        assert (v.difference.low, v.difference.high) == pytest.approx((low, high), abs=0.01)
        assert v.p == pytest.approx(scipys.pvalue, abs=0.02)
        wins = scores[v.first] > scores[v.second]
        assert v.win_rate.mean == pytest.approx(wins.mean())
        scipys_rate = stats.binomtest(int(wins.sum()), 60).proportion_ci(method="wilson")
        assert v.win_rate.low == pytest.approx(scipys_rate.low, abs=0.01)
    assert [v.p_holm for v in found] == holm([v.p for v in found])
    assert found == all_pairs([one_run(name, list(s)) for name, s in scores.items()])


def test_wins_of_runs_and_samples_by_hand() -> None:
    """Prompt 1: 3 beats 1 and ties 3; 0 loses twice. Prompt 2: 5 beats 4. Run 2 loses all."""
    first = Scored("a", [[[3.0, 0.0], [5.0]], [[-1.0], [-1.0]]], [[[1, 1], [1]], [[1], [1]]])
    second = Scored("b", [[[1.0, 3.0], [4.0]]], [[[1, 1], [1]]])
    assert win_rate_of_runs(first, second).mean == pytest.approx(((1.5 / 4 + 1) / 2 + 0) / 2)
    duels = duels_of(first, second)
    assert np.bincount(duels.prompts, duels.weights).tolist() == [1.0, 1.0]


def test_the_other_side_sees_the_complement() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.3, 1, 40), rng.normal(0, 1, 40)
    long, short = list(rng.normal(60, 20, 40)), list(rng.normal(40, 20, 40))
    (forth,) = all_pairs([one_run("a", list(a), long), one_run("b", list(b), short)])
    (back,) = all_pairs([one_run("b", list(b), short), one_run("a", list(a), long)])
    for view in ("of", "wins", "wins_at_equal_length"):
        seen, other = getattr(forth, view)("b"), getattr(back, view)("b")
        assert (seen.mean, seen.low, seen.high) == pytest.approx(
            (other.mean, other.low, other.high), abs=1e-9
        )


def duels(wins: np.ndarray, differences: np.ndarray) -> Duels:
    rows = len(wins)
    zeros = np.zeros(rows, dtype=np.int64)
    return Duels(wins, differences, np.arange(rows), np.ones(rows), zeros, zeros)


def test_the_fit_is_scikit_learns() -> None:
    rng = np.random.default_rng(2)
    z = rng.normal(0, 0.7, 80)
    wins = rng.choice([0.0, 0.5, 1.0, 0.25], 80)
    weights = rng.random(80) + 0.5
    beta, hessian = fit(wins, z, weights)
    # A tie is half a win and half a loss; one more stands at z = 0.
    x = np.concatenate([z, [0.0]])
    won = np.concatenate([wins, [0.5]])
    w = np.concatenate([weights, [1.0]])
    model = LogisticRegression(C=1 / RIDGE, tol=1e-10, max_iter=10_000)
    model.fit(
        np.concatenate([x, x])[:, None],
        np.repeat([1, 0], 81),
        sample_weight=np.concatenate([w * won, w * (1 - won)]),
    )
    assert beta == pytest.approx([model.intercept_[0], model.coef_[0, 0]], abs=1e-5)
    p = 1 / (1 + np.exp(-(beta[0] + beta[1] * x)))
    assert hessian[0, 0] == pytest.approx((w * p * (1 - p)).sum())


def test_wins_by_length_alone_are_none_at_equal_length() -> None:
    """The longer answer wins with probability 0.9, whoever wrote it; one side's are longer."""
    rng = np.random.default_rng(3)
    differences = rng.normal(30, 40, 400)
    wins = (rng.random(400) < np.where(differences > 0, 0.9, 0.1)).astype(np.float64)
    found = length_controlled(duels(wins, differences))
    assert wins.mean() > 0.65
    assert found.low < 0.5 < found.high
    assert found.high - found.low < 0.2


def test_a_side_that_wins_everything_has_a_rate_all_the_same() -> None:
    """At equal length n wins beside one tie: (n + 1/2)/(n + 1)."""
    found = length_controlled(duels(np.ones(49), np.zeros(49)))
    assert found.mean == pytest.approx(49.5 / 50)
    # Wilson's at 49 answers, as of the plain rate, around 0.99.
    z2 = 1.95996**2
    half = 1.95996 * (0.99 * 0.01 / 49 + z2 / (4 * 49**2)) ** 0.5
    assert found.low == pytest.approx((0.99 + z2 / 98 - half) / (1 + z2 / 49), abs=1e-5)
    assert found.high == pytest.approx((0.99 + z2 / 98 + half) / (1 + z2 / 49), abs=1e-5)
    tied = length_controlled(duels(np.full(49, 0.5), np.linspace(-9, 9, 49)))
    assert (tied.mean, tied.low, tied.high) == pytest.approx((0.5, 0.5, 0.5))
