from dataclasses import replace

import pytest

from prefloop.intervals import Interval
from prefloop.rewards.health import Vitals, distinct_n, repeated_share, signs


def near(value: float) -> Interval:
    return Interval(value, value - 0.1, value + 0.1)


SFT = Vitals(near(0.0), near(0.0), near(0.0), 20.0, 0.1, 0.8, 0.02)


def test_distinct_2() -> None:
    # ab bc | ab: two distinct of three
    assert distinct_n(["abc", "ab"]) == pytest.approx(2 / 3)
    assert distinct_n(["a", ""]) == 0.0


def test_repeated_share() -> None:
    assert repeated_share([1, 1, 1, 1, 1]) == pytest.approx(2 / 3)  # three 3-grams, one of them new
    assert repeated_share([1, 2, 3, 4]) == 0.0
    assert repeated_share([1, 2]) == 0.0


def test_a_healthy_model_shows_no_sign() -> None:
    better = Vitals(near(1.0), near(2.0), near(4.0), 24.0, 0.15, 0.75, 0.05)
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
