from dataclasses import replace

import pytest

from prefloop.intervals import Interval
from prefloop.rewards.health import (
    Trend,
    Vitals,
    copied_share,
    distinct_n,
    drift,
    fall,
    repeated_share,
    signs,
    training_signs,
)


def near(value: float) -> Interval:
    return Interval(value, value - 0.1, value + 0.1)


SFT = Vitals(near(0.0), near(0.0), near(0.0), 20.0, 0.1, 0.8, 0.02, 0.05)


def test_distinct_2() -> None:
    # ab bc | ab: two distinct of three
    assert distinct_n(["abc", "ab"]) == pytest.approx(2 / 3)
    assert distinct_n(["a", ""]) == 0.0


def test_repeated_share() -> None:
    assert repeated_share([1, 1, 1, 1, 1]) == pytest.approx(2 / 3)  # three 3-grams, one of them new
    assert repeated_share([1, 2, 3, 4]) == 0.0
    assert repeated_share([1, 2]) == 0.0


def test_copied_share() -> None:
    # of 123 234 345 the prompt has 123 and 345; twice the same counts twice
    assert copied_share([1, 2, 3, 4, 5], [3, 4, 5, 9, 1, 2, 3]) == pytest.approx(2 / 3)
    assert copied_share([1, 1, 1, 1], [1, 1, 1]) == 1.0
    assert copied_share([1, 2], [1, 2]) == copied_share([1, 2, 3], [1, 2]) == 0.0


def test_a_healthy_model_shows_no_sign() -> None:
    better = Vitals(near(1.0), near(2.0), near(4.0), 24.0, 0.15, 0.75, 0.05, 0.2)
    assert signs(better, SFT) == []
    assert signs(replace(SFT, proxy=None), replace(SFT, proxy=None)) == []


@pytest.mark.parametrize(
    ("change", "name", "numbers"),
    [
        ({"gold": near(-1.0), "proxy": near(3.0)}, "proxy up, judge down", ("3.00", "-1.00")),
        ({"kl": near(31.4)}, "KL", ("31.4", "10")),
        ({"truncated": 0.5}, "truncation", ("10%", "50%")),
        ({"distinct_2": 0.3}, "distinct-2", ("0.80", "0.30")),
        ({"repeated": 0.4}, "repetition", ("2%", "40%")),
        ({"copied": 0.26}, "copying", ("5%", "26%")),
        ({"length": 31.0}, "length", ("20", "31")),
        ({"length": 12.0}, "length", ("20", "12")),
    ],
)
def test_each_rule_tells_its_numbers(
    change: dict[str, object], name: str, numbers: tuple[str, ...]
) -> None:
    (sign,) = signs(replace(SFT, **change), SFT)  # type: ignore[arg-type]
    assert sign.name == name
    assert all(number in sign.text for number in numbers)


def test_intervals_that_touch_are_no_sign() -> None:
    down = replace(SFT, gold=Interval(-0.3, -0.6, 0.0), proxy=near(3.0))
    assert signs(down, SFT) == []


# --- rules on metrics of training ----------------------------------------------------------------

CALM = {
    "kl": (0.0, 5.0),
    "entropy": (60.0, 40.0),
    "length": (20.0, 22.0),
    "truncated": (0.1, 0.2),
    "distinct_2": (0.8, 0.7),
    "clipped": (0.1, 0.1),
    "ratio": (1.0, 1.02),
    "gap": (0.01, 0.02),
    "explained": (-3.0, 0.4),
    "chosen": (0.0, -4.0),
}
WORSE = {  # the rule, the metric's present, what is told
    "KL": ("kl", 12.0, "12.0 nats > 10"),
    "entropy": ("entropy", 19.0, "3.00 → 0.86, below 0.3 of it"),  # 60 / 20, 19 / 22 a token
    "length": ("length", 31.0, "20 → 31 tokens"),
    "truncation": ("truncated", 0.31, "10% → 31%"),
    "distinct-2": ("distinct_2", 0.5, "0.80 → 0.50, below 0.7"),
    "clipping": ("clipped", 0.4, "40% > 30%"),
    "ratio": ("ratio", 1.15, "1.15, not within 0.1 of 1"),
    "sampler gap": ("gap", 0.2, "0.20 > 0.1 nats a token"),
    "critic": ("explained", -0.2, "explained variance -0.20 < 0"),
    "chosen sinks": ("chosen", -11.0, "log-ratio -11.0 < -10 nats"),
}


def trends(readings: int = 16, **present: float) -> dict[str, Trend]:
    """Four readings of the start, then the present; `readings` in all."""
    found = {}
    for name, (start, now) in CALM.items():
        found[name] = Trend()
        for number in range(readings):
            found[name].add(start if number < 4 else present.get(name, now))
    return found


def test_a_calm_run_shows_no_sign() -> None:
    assert training_signs(trends()) == []
    assert training_signs({}) == []


@pytest.mark.parametrize("name", WORSE)
def test_each_rule_of_training_tells_its_numbers(name: str) -> None:
    metric, now, told = WORSE[name]
    (sign,) = training_signs(trends(**{metric: now}))
    assert sign.name == name
    assert told in sign.text
    assert sign.why and sign.advice


def test_few_readings_say_nothing() -> None:
    """Eight are asked for; a critic has 16 to learn in."""
    worst = {metric: now for metric, now, _ in WORSE.values() if metric != "length"}
    assert training_signs(trends(7, **worst)) == []
    early = {sign.name for sign in training_signs(trends(15, **worst))}
    assert early == WORSE.keys() - {"critic", "length"}


def test_one_outlier_says_nothing() -> None:
    found = trends()
    found["kl"].add(1000.0)
    assert training_signs(found) == []
    assert (found["kl"].start, found["kl"].now, found["kl"].readings) == (0.0, 5.0, 17)


def test_a_target_of_the_kl_moves_its_limit() -> None:
    assert training_signs(trends(kl=19.0), kl_limit=20.0) == []
    assert training_signs(trends(kl=21.0), kl_limit=20.0)


def test_a_fall_is_measured_in_its_own_errors() -> None:
    # differences 1, 2, 3: a mean of 2 with an error of 1 / √3
    assert fall([1.0, 1.0, 1.0], [2.0, 3.0, 4.0]) == pytest.approx(2 * 3**0.5)
    assert fall([2.0, 3.0, 4.0], [1.0, 1.0, 1.0]) == pytest.approx(-2 * 3**0.5)
    assert fall([1.0, None, 1.0], [2.0, 9.0, 4.0]) == pytest.approx(2.0)  # 1 and 3: 2 ± 1
    assert fall([0.0, 0.0], [1.0, 1.0]) == float("inf")
    assert fall([1.0, 1.0], [1.0, 1.0]) == 0.0
    assert fall([1.0, None], [2.0, 3.0]) == 0.0  # one pair has no error


def test_what_has_no_score_is_no_sign() -> None:
    assert [s.name for s in drift({"kl": 3.0, "length": 90.0}, {"length": 20.0})] == ["length"]
