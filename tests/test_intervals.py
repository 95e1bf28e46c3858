"""Intervals and p-values against scipy and values worked by hand."""

import numpy as np
import pytest
from scipy import stats

from prefloop.intervals import Interval, estimate, holm, t_quantile, two_sided_p


@pytest.mark.parametrize("df", [1, 1.3, 2, 5.7, 29, 99, 1000, 50_000, 1e6])
def test_students_t_is_scipys(df: float) -> None:
    assert t_quantile(df) == pytest.approx(stats.t.ppf(0.975, df), rel=1e-5)
    for t in (0.01, 0.5, 2.0, 4.0):
        assert two_sided_p(t, df) == pytest.approx(2 * stats.t.sf(t, df), rel=1e-4)
    assert two_sided_p(-2.0, df) == two_sided_p(2.0, df)


def test_without_resamples_a_mean_is_read_as_scipy_reads_it() -> None:
    values = np.random.default_rng(1).normal(0.4, 1.0, 30)
    found = estimate(values, resamples=0)
    scipys = stats.ttest_1samp(values, 0.0)
    assert found.p() == pytest.approx(scipys.pvalue)
    low, high = scipys.confidence_interval()
    assert (found.interval().low, found.interval().high) == pytest.approx((low, high))


def test_resamples_widen_what_skewed_scores_need() -> None:
    """The reach is scipy's studentised bootstrap where that is longer than Student's."""
    values = np.random.default_rng(3).exponential(1.0, 25)

    def t_star(sample: np.ndarray, axis: int = -1) -> np.ndarray:
        error = sample.std(axis=axis, ddof=1) / 5
        return np.abs(sample.mean(axis=axis) - values.mean()) / error

    drawn = stats.bootstrap((values,), t_star, n_resamples=20_000, method="percentile", rng=0)
    expected = np.quantile(drawn.bootstrap_distribution, 0.95)
    found = estimate(values, resamples=20_000)
    assert expected > t_quantile(24) + 0.05
    assert found.reach == pytest.approx(expected, abs=0.05)
    share = float((drawn.bootstrap_distribution >= 2.5).mean())
    assert found.p(values.mean() - 2.5 * found.error) == pytest.approx(share, abs=0.005)


def test_an_interval_leaves_out_what_is_improbable() -> None:
    values = np.random.default_rng(5).gamma(2.0, 1.0, 40)
    found = estimate(values)
    for end in (found.interval().low, found.interval().high):
        away = 1e-3 * np.sign(end - found.mean)
        assert found.p(end - away) > 0.05 > found.p(end + away)
    assert estimate(values).interval() == found.interval()
    assert estimate(values, seed=1).interval() != found.interval()


def test_values_that_do_not_vary() -> None:
    assert estimate([2.0, 2.0, 2.0]).interval() == Interval(2.0, 2.0, 2.0)
    assert estimate([0.0, 0.0]).p() == 1.0
    assert estimate([2.0] * 5).p() == 2 / 32  # as five signs of one kind
    assert estimate([2.0]).p() == 1.0  # one prompt says nothing of others
    assert estimate([0.1, 0.1 + 1e-17, 0.1]).error == 0.0


def test_shares_are_wilsons() -> None:
    """30 of 40 with one degree of freedom spent: scipy's Wilson interval at 39 answers."""
    found = estimate([1.0] * 30 + [0.0] * 10).share(40)
    scipys = stats.binomtest(30, 40).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((scipys.low, scipys.high), abs=0.01)
    # By hand at p = 3/4, n = 39, t = 2.02269.
    z2 = 2.02269**2
    centre, half = 0.75 + z2 / 78, 2.02269 * (0.1875 / 39 + z2 / (4 * 39**2)) ** 0.5
    assert found.low == pytest.approx((centre - half) / (1 + z2 / 39), abs=1e-5)
    assert found.high == pytest.approx((centre + half) / (1 + z2 / 39), abs=1e-5)


def test_a_share_of_all_has_an_interval() -> None:
    """20 of 20: the lower end is 1/(1 + z^2/20)."""
    found = estimate([1.0] * 20).share(20)
    assert (found.mean, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(1 / (1 + 1.95996**2 / 20), abs=1e-5)
    assert estimate([0.5] * 20).share(20) == Interval(0.5, 0.5, 0.5)


def test_several_runs_are_a_draw_too() -> None:
    """Two runs on three prompts, worked by hand.

    Means by prompt 2, 3, 7, so s^2 = 7 and s^2/N = 7/3. Means by run 3 and 5: MS_runs = 3 * 2 = 6;
    what is left of run and prompt is -+1, 0, +-1: MS_rest = 4/2 = 2; (6 - 2)/(3 * 2) = 2/3.
    """
    runs = np.array([[2.0, 2.0, 5.0], [2.0, 4.0, 9.0]])
    found = estimate(runs.mean(axis=0), runs=[runs])
    assert found.mean == 4.0
    assert found.error**2 == pytest.approx(7 / 3 + 2 / 3)
    below = (7 / 3) ** 2 / 2 + (6**2 / 1 + 2**2 / 2) / 6**2
    assert found.df == pytest.approx(9 / below)
    assert not len(found.resampled)
    assert found.p() == pytest.approx(2 * stats.t.sf(4 / 3**0.5, found.df))
    alike = np.array([[1.0, 2.0, 6.0], [2.0, 3.0, 4.0]])  # runs differ less than chance has it
    assert estimate(alike.mean(axis=0), runs=[alike]).error == estimate(alike.mean(axis=0)).error


def test_runs_that_hardly_differ_have_an_interval() -> None:
    """Both prompts' means are -0.005. MS_runs = 2.02^2/4 = 1.0201 and MS_rest = 2^2/4 = 1, so their
    share is 0.0201/4, of which (1.0201^2 + 1)/16 would make 0.0002 degrees of freedom.
    """
    runs = np.array([[0.0, 1.0], [-0.01, -1.01]])
    found = estimate(runs.mean(axis=0), runs=[runs])
    assert found.error**2 == pytest.approx(0.0201 / 4)
    assert found.df == 1
    assert found.reach == pytest.approx(stats.t.ppf(0.975, 1))


def test_holm() -> None:
    """3 * 0.01; 2 * 0.02; 0.03, but no less than the one before."""
    assert holm([0.02, 0.01, 0.03]) == [0.04, 0.03, 0.04]
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    p = list(np.random.default_rng(0).random(12) ** 2)
    by_definition = [
        max(min(1.0, (12 - sum(r < q for r in p)) * q) for q in p if q <= each) for each in p
    ]
    assert holm(p) == pytest.approx(by_definition)
