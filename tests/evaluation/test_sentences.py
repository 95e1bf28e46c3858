"""The answer in words, for each thing that it may say."""

from collections.abc import Iterable
from dataclasses import replace

from prefloop.evaluation.comparison import PairVerdict, Way, WholeCost
from prefloop.evaluation.sentences import sentences
from prefloop.intervals import Interval
from prefloop.rewards.health import Sign, Vitals


def way(name: str, kl: float = 4.06, signs: Iterable[str] = ()) -> Way:
    one = Interval(kl, kl, kl)
    vitals = Vitals(one, None, one, 12.0, 0.0, 0.9, 0.0)
    fired = tuple(Sign(sign, "1 → 2") for sign in signs)
    return Way(name, vitals, None, False, fired, 0.1, None)


def pair(
    first: str, second: str, difference: float, p: float = 0.0002, equal: float = 0.7
) -> PairVerdict:
    """`second` is that much better, and wins `equal` at equal length."""
    d = Interval(-difference, -difference - 0.15, -difference + 0.15)
    rate = Interval(1 - equal, 0.95 - equal, 1.05 - equal)
    return PairVerdict(first, second, d, p / 3, p, rate, rate)


def test_better() -> None:
    costs = (WholeCost("DPO", (("SFT", 119.0), ("DPO", 541.4))),)
    ways, verdicts = [way("SFT"), way("DPO")], [pair("SFT", "DPO", 1.36)]
    assert sentences(ways, verdicts, costs) == (
        "DPO is better than SFT (judge +1.36 [1.21, 1.51], p < .001), at 4.1 nats; "
        "no sign of gaming; 660 CPU s in all (SFT 119 + DPO 541).",
    )


def test_worse_and_gaming() -> None:
    ways = [way("SFT"), way("PPO", 31.0, ["KL", "proxy up, judge down"])]
    assert sentences(ways, [pair("SFT", "PPO", -0.5, 0.0123, 0.2)], ()) == (
        "PPO is worse than SFT (judge -0.50 [-0.65, -0.35], p = .01), at 31.0 nats; "
        "signs of gaming: “KL” and “proxy up, judge down”.",
    )


def test_not_told_apart() -> None:
    ways = [way("SFT"), way("PPO", signs=["length"])]
    assert sentences(ways, [pair("SFT", "PPO", 0.1, 0.05, 0.5)], ()) == (
        "PPO is not told apart from SFT (judge +0.10 [-0.05, 0.25], p = .05), at 4.1 nats; "
        "sign of gaming: “length”.",
    )


def test_each_way_beside_all_others() -> None:
    best = replace(way("best-of-4", 0.636), kl_is_bound=True)
    ways = [way("SFT"), best, way("PPO"), way("DPO"), replace(way("KTO"), runs=(way("KTO"),) * 3)]
    verdicts = [
        *(pair("SFT", one.name, 1.0) for one in ways[1:]),
        pair("best-of-4", "PPO", 0.3),
        pair("best-of-4", "DPO", -0.4),
        pair("best-of-4", "KTO", 0.2, 0.3),
        pair("PPO", "DPO", -0.7),
        pair("PPO", "KTO", -0.5),
        pair("DPO", "KTO", 0.1, 1.0),
    ]
    told = sentences(ways, verdicts, ())
    assert [
        text.split("; ")[0].replace("(judge +1.00 [0.85, 1.15], p < .001)", "()") for text in told
    ] == [
        "best-of-4 is better than SFT () and DPO, worse than PPO and not told apart from "
        "KTO, at no more than 0.6 nats",
        "PPO is better than SFT (), best-of-4, DPO and KTO, at 4.1 nats",
        "DPO is better than SFT (), worse than best-of-4 and PPO and not told apart from KTO, at "
        "4.1 nats",
        "KTO (3 runs) is better than SFT (), worse than PPO and not told apart from best-of-4 and "
        "DPO, at 4.1 nats",
    ]


def test_better_by_length_alone() -> None:
    (told,) = sentences([way("SFT"), way("DPO")], [pair("SFT", "DPO", 1.0, equal=0.52)], ())
    assert (
        "; at equal length it wins 0.52 [0.47, 0.57] of the answers, which decides nothing; "
        in told
    )
    (told,) = sentences([way("SFT"), way("DPO")], [pair("SFT", "DPO", -1.0, equal=0.52)], ())
    assert "which decides nothing" in told
    (told,) = sentences([way("SFT"), way("DPO")], [pair("SFT", "DPO", -1.0, equal=0.4)], ())
    assert "equal length" not in told
