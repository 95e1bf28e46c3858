"""Did people prefer it? What they said of compared answers, in numbers and sentences. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from prefloop.evaluation.length_control import Duels, length_controlled
from prefloop.evaluation.preferences import (
    Floats,
    Ints,
    Judged,
    judgements_needed,
    share,
    strengths,
)
from prefloop.intervals import Interval, complement, holm
from prefloop.labelling.agreement import ceiling, share_by_prompt

UNLIKELY = 0.05


@dataclass(frozen=True)
class Preference:
    """Two ways, as people judged their answers to the same prompts where the texts differ."""

    first: str
    second: str
    judgements: int
    prompts: int
    labellers: int
    wins: int  # of the first
    ties: int
    losses: int
    win_rate: Interval  # of the first, ties half; prompts and labellers as clusters
    length_controlled: Interval  # of the first, were the answers as long
    p: float  # two-sided, that it is 1/2
    p_holm: float  # adjusted for all pairs of ways
    judge: float | None  # the judge's win rate in the same judgements, those that it scored
    reward_model: float | None
    more: int | None  # judgements that would tell them apart if the share stays; None: no number
    same_text: float  # share of prompts that both answered letter by letter alike


@dataclass(frozen=True)
class Strength:
    """A way's Bradley-Terry strength: log-odds of being preferred to the first way's answer."""

    way: str
    value: Interval | None  # None: no chain of judgements joins it to the first way


@dataclass(frozen=True)
class PeopleAgreement:
    """Agreement on pairs of answers, ties half, between 0 and 1; 1/2 is chance."""

    pairs: int  # of answers that somebody judged
    shared: int  # that two people or more judged
    judge: Interval | None  # with one person, on pairs that it scored
    reward_model: Interval | None
    people: Interval | None  # one person with another, on shared pairs
    ceiling: tuple[float, float] | None  # of a scorer's, by that (labelling.agreement.ceiling)


@dataclass(frozen=True)
class PeopleVerdict:
    """What people said of a comparison's answers."""

    source: str  # STORE#PROJECT
    sentences: tuple[str, ...]
    ways: tuple[str, ...]
    judgements: int  # of tasks
    prompts: int
    labellers: int
    pairs: tuple[Preference, ...]
    strengths: tuple[Strength, ...]
    agreement: PeopleAgreement
    flags: Mapping[str, Mapping[str, int]]  # by way, then flag; "" is the whole task
    all_bad: int  # judgements that say so
    left_out: Mapping[str, int]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Rows:
    """What was read: judgements between ways, and between texts."""

    judged: Judged
    tokens: Sequence[int]  # of the first way's answer minus those of the second's
    judge: Sequence[float | None]  # a judgement's score, as the judge gives it
    reward_model: Sequence[float | None]
    pairs: Sequence[PairOfTexts]


@dataclass(frozen=True)
class PairOfTexts:
    """Two answers to a prompt, with everyone's verdict: 1 the first, -1 the second, 0 neither."""

    prompt: int
    people: Sequence[int]
    judge: float | None
    reward_model: float | None


def preferences(
    rows: Rows, ways: Sequence[str], same: Mapping[tuple[int, int], float]
) -> tuple[Preference, ...]:
    """Each two ways that people compared, in the order of the ways."""
    judged, found = rows.judged, []
    for first, second in combinations(range(len(ways)), 2):
        mine = np.flatnonzero((judged.first == first) & (judged.second == second))
        if not len(mine):
            continue
        scores, prompts = judged.scores[mine], judged.prompts[mine]
        labellers = judged.labellers[mine]
        told = share(scores, prompts, labellers)
        needed = judgements_needed(told.interval.mean, told.design)
        values: dict[str, Any] = {
            "judgements": len(mine),
            "prompts": len(np.unique(prompts)),
            "labellers": len(np.unique(labellers)),
            "wins": int((scores == 1).sum()),
            "ties": int((scores == 0.5).sum()),
            "losses": int((scores == 0).sum()),
            "win_rate": told.interval,
            "length_controlled": _at_equal_length(scores, np.array(rows.tokens)[mine], prompts),
            "p": told.p,
            "judge": _mean_of([rows.judge[row] for row in mine.tolist()]),
            "reward_model": _mean_of([rows.reward_model[row] for row in mine.tolist()]),
            "more": None if needed is None else max(0, needed - len(mine)),
            "same_text": same[first, second],
        }
        found.append((ways[first], ways[second], values))
    adjusted = holm([values["p"] for *_, values in found])
    return tuple(
        Preference(first, second, p_holm=p, **values)
        for (first, second, values), p in zip(found, adjusted, strict=True)
    )


def _mean_of(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else None


def _at_equal_length(scores: Floats, differences: Ints, prompts: Ints) -> Interval:
    """The win rate that `evaluation.length_control` gives; a prompt's judgements weigh 1 in all."""
    _, index, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    alone = np.zeros(len(scores), dtype=np.int64)
    tokens, weights = differences.astype(np.float64), 1 / counts[index]
    return length_controlled(Duels(scores, tokens, index, weights, alone, alone))


def agreement(pairs: Sequence[PairOfTexts]) -> PeopleAgreement:
    """How far the judge and the reward model agree with people, and people with each other."""

    def with_people(verdicts: Sequence[float | None]) -> Interval | None:
        known = [(v, pair) for v, pair in zip(verdicts, pairs, strict=True) if v is not None]
        agreed = [
            sum(_agreed(verdict, person) for person in pair.people) / len(pair.people)
            for verdict, pair in known
        ]
        prompts = np.array([pair.prompt for _, pair in known])
        return share_by_prompt(np.array(agreed), prompts) if known else None

    shared = [pair for pair in pairs if len(pair.people) > 1]
    among = [[_agreed(a, b) for a, b in combinations(pair.people, 2)] for pair in shared]
    means = np.array([sum(each) / len(each) for each in among])
    groups = np.array([pair.prompt for pair in shared])
    people = share_by_prompt(means, groups) if shared else None
    return PeopleAgreement(
        pairs=len(pairs),
        shared=len(shared),
        judge=with_people([pair.judge for pair in pairs]),
        reward_model=with_people([pair.reward_model for pair in pairs]),
        people=people,
        ceiling=ceiling(people.mean) if people and people.mean >= 0.5 else None,
    )


def _agreed(one: float, other: float) -> float:
    """1 for the same verdict, 1/2 where one of two is a tie, 0 for opposites."""
    return 1 - abs(one - other) / 2


def strengths_of(judged: Judged, ways: Sequence[str]) -> tuple[Strength, ...]:
    """Every way's strength, the first way's being 0."""
    return tuple(map(Strength, ways, strengths(judged, len(ways))))


# --- in words ------------------------------------------------------------------------------------


def sentences_of(
    pairs: Sequence[Preference], ways: Sequence[str], measured: PeopleAgreement
) -> tuple[str, ...]:
    """The verdict: each way against the first one, then what the judges' verdicts are worth."""
    against = [pair for pair in pairs if pair.first == ways[0]]
    lines = [_sentence(pair) for pair in against]
    if untold := [way for way in ways[1:] if way not in {pair.second for pair in against}]:
        lines.append(f"Nobody compared {', '.join(untold)} with {ways[0]}.")
    known = (("the judge", measured.judge), ("the reward model", measured.reward_model))
    said = [f"{name} agrees with a person on {_percent(x)} of pairs" for name, x in known if x]
    if measured.people:
        said.append(f"one person with another on {_percent(measured.people)}")
    else:
        said.append("nobody judged what another did, so how far people agree is not known")
    told = ", ".join(said)
    return (*lines, f"{told[0].upper()}{told[1:]} (ties half).")


def _sentence(pair: Preference) -> str:
    # Of the way, against the first one.
    rate, even = complement(pair.win_rate), complement(pair.length_controlled)
    way, other = pair.second, pair.first
    if pair.p_holm < UNLIKELY:
        if rate.mean < 0.5:
            rate, even, way, other = pair.win_rate, pair.length_controlled, other, way
        return f"People prefer {way} to {other}: {_said(pair, rate, even)}."
    end = "no number of judgements tells an even share apart"
    if pair.more is not None:
        end = f"about {_rounded(pair.more):,} more would, if that is the true share"
        if pair.more == 0:
            end = "with so many pairs of ways it may be chance"
    return f"People do not tell {way} from {other}: {_said(pair, rate, even)}; {end}."


def _said(pair: Preference, rate: Interval, even: Interval) -> str:
    return (
        f"{_percent(rate)} of {pair.judgements:,} judgements, ties half ({pair.prompts} prompts, "
        f"{people(pair.labellers)}); {_percent(even)} at equal length"
    )


def people(count: int) -> str:
    """So many of them."""
    return "1 person" if count == 1 else f"{count} people"


def _percent(rate: Interval) -> str:
    return f"{rate.mean:.0%} [{rate.low:.0%}, {rate.high:.0%}]"


def _rounded(number: int) -> int:
    """Two digits say as much as the estimate knows."""
    digits = max(0, len(str(number)) - 2)
    return int(round(number, -digits))
