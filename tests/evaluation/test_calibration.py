from math import exp, log

import numpy as np
import pytest

from prefloop.evaluation.calibration import calibrate, ceiling


def test_by_hand() -> None:
    result = calibrate([2.0, 0.0, 1.0, -1.0], [0.0, 0.0, 2.0, -4.0], [5, 5, 9, 1], [3, 3, 4, 4], 2)
    deltas = [2.0, 0.0, -1.0, 3.0]
    assert result.pairs == 4
    assert result.accuracy == (1 + 0.5 + 0 + 1) / 4
    assert result.log_loss == pytest.approx(sum(log(1 + exp(-d)) for d in deltas) / 4)
    low, high = result.bins  # |delta| 0, 1 | 2, 3
    assert (low.low, low.high, low.pairs, low.accuracy) == (0.0, 1.0, 2, 0.25)
    assert (high.low, high.high, high.accuracy) == (2.0, 3.0, 1.0)
    assert low.expected == pytest.approx((0.5 + 1 / (1 + exp(-1))) / 2)
    shorter, longer = result.length_bins  # lengths -3, 2 | 2, 5
    assert (shorter.low, shorter.accuracy, longer.accuracy) == (-3.0, 1.0, 0.25)
    assert result.always_longer_accuracy == 0.75


def test_a_calibrated_model_is_found_calibrated() -> None:
    rng = np.random.default_rng(0)
    delta = np.abs(rng.normal(0, 2, 40_000))
    sign = np.where(rng.random(40_000) < 1 / (1 + np.exp(-delta)), 1.0, -1.0)
    lengths = [1] * 40_000
    result = calibrate((sign * delta).tolist(), [0.0] * 40_000, lengths, lengths)
    assert all(abs(part.accuracy - part.expected) < 0.015 for part in result.bins)
    assert result.always_longer_accuracy == 0.5


def test_huge_differences_do_not_overflow() -> None:
    assert calibrate([-1e4], [1e4], [1], [1]).log_loss == pytest.approx(2e4)


@pytest.mark.parametrize("kinds", [[0.9], [1.0, 0.5], [0.99, 0.8, 0.6]])
def test_ceiling_holds_the_truth(kinds: list[float]) -> None:
    """Labels right with probability p, by kind of pair: a perfect model is right with mean p."""
    agreement = float(np.mean([p * p + (1 - p) * (1 - p) for p in kinds]))
    low, high = ceiling(agreement)
    assert low - 1e-12 <= float(np.mean(kinds)) <= high + 1e-12
    if len(kinds) == 1:
        assert high == pytest.approx(kinds[0])


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"agreement 0\.4"):
        ceiling(0.4)
    with pytest.raises(ValueError, match="no pairs"):
        calibrate([], [], [], [])
