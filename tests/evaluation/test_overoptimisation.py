"""Gao's forms: exact curves are found again, peaks and falls are those worked by hand."""

import subprocess
import sys
from math import exp, isclose, log, sqrt

import numpy as np
import pytest

from prefloop.errors import UserError
from prefloop.evaluation.overoptimisation import (
    Curve,
    Point,
    Resamples,
    draw_prompts,
    draw_runs,
    fall,
    fit,
    fit_with_intervals,
    points_of_run,
    windows,
)
from prefloop.files import write_jsonl

KLS = (0.0, 0.5, 1.0, 4.0, 9.0, 16.0, 30.0)


def rl(kl, start=0.2, alpha=1.5, beta=0.5):
    d = sqrt(kl)
    return start + (d * (alpha - beta * log(d)) if d else 0.0)


def best(kl, start=0.2, alpha=1.5, beta=0.25):
    d = sqrt(kl)
    return start + d * (alpha - beta * d)


def points(reward, kls=KLS, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return [Point(kl, 2 * kl, reward(kl) + noise * rng.normal(), 0.1) for kl in kls]


@pytest.mark.parametrize(("form", "reward", "beta"), [("rl", rl, 0.5), ("best-of-n", best, 0.25)])
def test_an_exact_curve_is_found_again(form, reward, beta):
    curve = fit(points(reward), form, "gold")
    assert (curve.start, curve.alpha, curve.beta) == pytest.approx((0.2, 1.5, beta))
    assert curve.at(7.0) == pytest.approx(reward(7.0))


def test_a_noisy_fit_is_scipys():
    """scipy's search for the least squares, from elsewhere, ends at the same numbers."""
    optimize = pytest.importorskip("scipy.optimize")
    noisy = points(rl, tuple(np.linspace(0.1, 40, 25)), noise=0.3)
    kls, golds = [p.kl for p in noisy], [p.gold for p in noisy]
    found, _ = optimize.curve_fit(np.vectorize(rl), kls, golds, p0=(0.0, 1.0, 1.0))
    curve = fit(noisy, "rl", "gold")
    assert (curve.start, curve.alpha, curve.beta) == pytest.approx(found, rel=1e-5)


def test_peaks_worked_by_hand():
    """RL: d = e^(alpha/beta - 1) = e, R = beta d; best-of-n: d = alpha / (2 beta) = 3."""
    rising = Curve("rl", 0.0, 2.0, 1.0)
    assert rising.peak_kl == pytest.approx(exp(2))
    assert rising.at(exp(2)) == pytest.approx(exp(1))
    chosen = Curve("best-of-n", 1.0, 3.0, 0.5)
    assert (chosen.peak_kl, chosen.at(9.0)) == pytest.approx((9.0, 5.5))
    for form in ("rl", "best-of-n"):
        assert Curve(form, 0.0, 1.0, -0.1).peak_kl is None
    assert Curve("best-of-n", 0.0, -1.0, 0.1).peak_kl is None


def test_a_kl_sampled_below_zero_is_the_start():
    assert Curve("rl", 0.3, 1.0, 1.0).at(-0.2) == 0.3


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="three of different KL"):
        fit(points(rl)[:2] * 3, "rl", "gold")


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of 95 % intervals of alpha over a run's 80 points, 95 % do, within two of a hundred and what
    500 trials leave open (one of a hundred).
    """
    held = 0
    for trial in range(500):
        noisy = points(rl, tuple(np.linspace(0.1, 20, 80)), noise=0.2, seed=trial)
        draw = draw_runs([noisy])
        got = fit_with_intervals(noisy, "rl", "gold", draw, seed=trial, resamples=400)
        held += got.alpha.low <= 1.5 <= got.alpha.high
    assert 0.92 <= held / 500 <= 0.98


def test_runs_are_drawn_whole():
    """Two runs on curves of their own: a draw has the one, the other, or as much of both."""
    runs = [points(lambda kl, a=a: rl(kl, alpha=a), tuple(range(1, 40))) for a in (1.0, 3.0)]
    drawn = draw_runs(runs)(np.random.default_rng(0), 300)
    of_first = drawn.weights[:, :39].sum(1)
    assert set(of_first) == {0.0, 39.0, 78.0}
    assert (drawn.weights.sum(1) == 78).all()
    assert (of_first == 39).mean() == pytest.approx(0.5, abs=0.1)
    assert drawn.gold[7].tolist() == [p.gold for run in runs for p in run]


def test_a_peak_beyond_what_was_seen_is_told():
    near, far = points(rl, (1.0, 2.0, 3.0, 4.0)), points(rl, (1.0, 20.0, 40.0, 80.0))
    whole = fit(near, "rl", "gold").peak_kl
    assert whole == pytest.approx(exp(2 * (1.5 / 0.5 - 1)))  # 54.6 nats
    for seen, share in ((near, 0.0), (far, 1.0)):
        got = fit_with_intervals(seen, "rl", "gold", as_they_are(seen), resamples=5)
        assert got.peaked == share
        assert got.peak_kl.mean == pytest.approx(whole)


def as_they_are(seen):
    def draw(rng, count):
        golds = np.array([[p.gold for p in seen]] * count)
        return Resamples(np.ones_like(golds), golds, golds)

    return draw


def test_prompts_are_drawn_for_all_n_at_once():
    """Each prompt's scores lie on a curve of its own: so do those of any draw of prompts."""
    kls, alphas = (0.0, 1.0, 2.0, 4.0), (1.0, 2.0, 4.0)
    scores = [[best(kl, alpha=alpha) for alpha in alphas] for kl in kls]
    drawn = draw_prompts(scores, scores)(np.random.default_rng(3), 200)
    at_one = drawn.gold[:, 1] - 0.2 + 0.25  # d = 1: the mean of the alphas that were drawn
    choices = np.array(np.meshgrid(*[alphas] * 3)).T.reshape(-1, 3).mean(1)
    assert set(at_one.round(6)) == set(choices.round(6))
    assert drawn.gold[:, 3] - 0.2 + 1.0 == pytest.approx(2 * at_one)  # d = 2, of the same prompts
    assert (drawn.weights == 1).all()


def test_windows_are_means_with_their_errors():
    four = [Point(float(i), 2.0 * i, 3.0 * i, 0.3) for i in range(4)]
    first, second = windows(four, 2)
    assert (first.kl, first.proxy, first.gold) == (0.5, 1.0, 1.5)
    assert isclose(first.error, 0.3 / sqrt(2))
    assert second.gold == 7.5


def test_a_fall_is_measured_by_other_points_than_chose_the_peak():
    """Windows of two: the first points choose the second window, its second point measures it."""
    golds = [0.0, 0.0, 5.0, 1.0, 0.0, 3.0, 0.5, 0.5]
    run = [Point(float(i), 0.0, gold, 0.3) for i, gold in enumerate(golds)]
    found = fall(run, 4)
    assert (found.kl, found.peak, found.last) == (3.0, 1.0, 0.5)
    assert found.error == pytest.approx(sqrt(0.3**2 + 0.3**2 / 2))
    assert found.standard_errors == pytest.approx(0.5 / found.error)


def test_a_run_that_ends_at_its_peak_has_not_fallen():
    run = [Point(float(i), 0.0, float(i), 0.3) for i in range(8)]
    found = fall(run, 4)
    assert (found.peak, found.last, found.standard_errors) == (6.5, 6.5, 0.0)


def test_noise_alone_falls_by_two_errors_no_oftener_than_it_should():
    """A level run: the choice of its highest window must not look like a fall from it."""
    rng = np.random.default_rng(0)
    fell = 0
    for _ in range(500):
        run = [Point(float(i), 0.0, rng.normal(0, 0.3), 0.3) for i in range(48)]
        fell += fall(run).standard_errors > 2
    assert fell / 500 < 0.04  # one-sided, 2.3 %


def test_points_of_a_run_that_was_monitored(tmp_path):
    """The own KL of a line, or that of the iteration before it; an interval is 3.92 errors wide."""
    lines = [
        {"step": 1, "objective/kl": 0.5, "objective/scores": 1.0},
        {"step": 2, "monitor/score": 2.0, "monitor/low": 1.02, "monitor/high": 2.98},
        {"step": 3, "objective/kl": 3.0, "objective/scores": 4.0},
        {"step": 4, "monitor/score": 1.0, "monitor/low": 0.02, "monitor/high": 1.98}
        | {"monitor/kl": 3.5},
    ]
    write_jsonl(tmp_path / "metrics.jsonl", lines)
    first, second = points_of_run(tmp_path)
    assert (first.kl, first.proxy, first.gold) == (0.5, 1.0, 2.0)
    assert (second.kl, second.proxy, second.gold) == (3.5, 4.0, 1.0)
    assert first.error == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"objective/kl": 1.0, "objective/scores": 1.0}, "train with --monitor"),
        ({"objective/scores": 1.0, "monitor/score": 1.0}, "name a --ref-model"),
    ],
)
def test_runs_without_what_is_needed_are_refused(tmp_path, line, message):
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": 1} | line])
    with pytest.raises(UserError, match=message):
        points_of_run(tmp_path)


def test_no_torch():
    """Neither the module nor what it imports loads torch."""
    code = "import sys, prefloop.evaluation.overoptimisation; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
