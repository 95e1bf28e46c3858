"""How good a project's labels are, and each labeller's record: `prefloop label report`.

It flags people and drops nobody: leaving annotations out is an explicit choice at export.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefloop.intervals import Interval
from prefloop.labelling import agreement as ag
from prefloop.labelling.agreement import Floats, Ints
from prefloop.labelling.export import project_id_of
from prefloop.labelling.store import Store
from prefloop.labelling.store.reading import Annotation, annotations_of, lengths_of

MOST = 9
"""Answers of a task."""
FAST = 0.2
"""An annotation is an outlier of speed below this share of the project's median seconds."""
# A labeller is flagged beyond these, given ENOUGH of what each is taken from: pairs of answers of
# gold, shared and repeated tasks, annotations made on the page, tasks seen.
ENOUGH = 10
LOW_GOLD, LOW_ACCURACY, LOW_CONSISTENCY = 0.6, 0.55, 0.7
MUCH_FAST, MUCH_SKIPPED, UNLIKELY = 0.2, 0.3, 0.01


@dataclass(frozen=True)
class Record:
    """One labeller. A share is None where there is nothing to take it from."""

    name: str
    annotations: int
    skip_rate: float | None
    agreement: float | None  # with others, on shared tasks
    accuracy: float | None  # one-coin Dawid-Skene, on pairs of answers
    gold_accuracy: float | None  # on pairs of gold tasks, ties half
    gold_pairs: int
    consistency: float | None  # pair agreement with the own earlier annotation
    first_wins: float | None  # pairs won by the answer shown earlier
    first_wins_p: float | None
    seconds: float | None  # median
    fast: float | None  # share of outliers of speed
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Quality:
    """A project's labels, measured."""

    project: str
    annotations: int
    shared_tasks: int  # with two or more labellers
    agreement: Interval | None  # share of pairs that two labellers order alike, ties half
    alpha: Interval | None  # Krippendorff's, ordinal
    ceiling: tuple[float, float] | None  # of a reward model's accuracy
    first_wins: float | None
    first_wins_p: float | None
    longer_wins: Interval | None  # strict pairs won by the longer answer
    skip_rate: float | None
    flagged_answers: Mapping[str, int]
    labellers: tuple[Record, ...]


@dataclass
class _Data:
    """Annotations as arrays; one row each."""

    said: list[Annotation] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    names: list[str] = field(default_factory=list)
    flags: Counter[str] = field(default_factory=Counter)
    ranks: Ints = field(default_factory=lambda: np.zeros((0, MOST), dtype=np.int64))  # -1: none
    shown: Ints = field(default_factory=lambda: np.zeros((0, MOST), dtype=np.int64))
    answers: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    task: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    prompt: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    who: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    seconds: Floats = field(default_factory=lambda: np.zeros(0))
    served: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=bool))
    shared: list[tuple[int, int]] = field(default_factory=list)  # rows of two labellers, one task


def measure(store: Store, project: str, seed: int = 0) -> Quality:
    """Everything the report shows."""
    with store.read() as t:
        project_id = project_id_of(t, project)
        data = _read(annotations_of(t, project_id))
        lengths = lengths_of(t, project_id)
    real = np.array([a.kind == "real" for a in data.said], dtype=bool)
    on_page = real & data.served  # what was imported has no place, and no time
    first, second = _columns(data.shared)
    agreed = _agreement(data, first, second)
    shares = _first_wins(data)
    wins, win_p = ag.share_test(shares[on_page]) if on_page.any() else (None, None)
    estimate = ag.share_by_prompt(agreed, data.prompt[first]) if len(agreed) else None
    skipped = sum(data.skipped.values())
    total = len(data.said) + skipped
    return Quality(
        project=project,
        annotations=len(data.said),
        shared_tasks=len({int(task) for task in data.task[first]}),
        agreement=estimate,
        alpha=_alpha(data, first, second, seed),
        ceiling=ag.ceiling(estimate.mean) if estimate and estimate.mean >= 0.5 else None,
        first_wins=wins,
        first_wins_p=win_p,
        longer_wins=_longer_wins(data, real, lengths),
        skip_rate=skipped / total if total else None,
        flagged_answers=dict(data.flags),
        labellers=_records(data, agreed, shares),
    )


def _read(annotations: Iterable[Annotation]) -> _Data:
    data = _Data()
    ranks, shown = [], []
    index: dict[str, int] = {}
    by_task: defaultdict[int, list[int]] = defaultdict(list)
    for a in annotations:
        if a.kind == "practice":
            continue
        data.flags.update(str(flag["flag"]) for flag in a.flags)
        if a.strategy == "adjudication":
            continue
        index.setdefault(a.labeller, len(index))
        if a.tiers is None:
            data.skipped[a.labeller] += 1
            continue
        count = len(a.response_ids)
        ranks.append(ag.ranks_of(a.tiers, count) + [-1] * (MOST - count))
        shown.append([*a.shown, *[-1] * (MOST - count)])
        if a.kind == "real":
            by_task[a.task_id].append(len(data.said))
        data.said.append(a)
    data.names = list(index)
    data.ranks = np.array(ranks, dtype=np.int64).reshape(-1, MOST)
    data.shown = np.array(shown, dtype=np.int64).reshape(-1, MOST)
    data.answers = np.array([len(a.response_ids) for a in data.said], dtype=np.int64)
    data.task = np.array([a.task_id for a in data.said], dtype=np.int64)
    data.prompt = np.array([a.prompt_id for a in data.said], dtype=np.int64)
    data.who = np.array([index[a.labeller] for a in data.said], dtype=np.int64)
    data.seconds = np.array([a.seconds for a in data.said], dtype=np.float64)
    data.served = np.array([a.strategy != "import" for a in data.said], dtype=bool)
    data.shared = [pair for rows in by_task.values() for pair in combinations(rows, 2)]
    return data


def _columns(pairs: Sequence[tuple[int, int]]) -> tuple[Ints, Ints]:
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _agreement(data: _Data, first: Ints, second: Ints) -> Floats:
    """Pair agreement of two annotations each."""
    agreement = np.zeros(len(first))
    for count in np.unique(data.answers[first]):
        rows = data.answers[first] == count
        a, b = (ag.pair_signs(data.ranks[side[rows]][:, :count]) for side in (first, second))
        agreement[rows] = ag.pair_agreement(a, b)
    return agreement


def _alpha(data: _Data, first: Ints, second: Ints, seed: int) -> Interval | None:
    rows = np.unique(np.concatenate([first, second]))
    if not len(rows):
        return None
    tasks, task = np.unique(data.task[rows], return_inverse=True)
    counts = np.zeros((len(tasks), MOST, MOST), dtype=np.int64)  # task, answer, rank
    for answer in range(MOST):
        there = data.ranks[rows, answer] >= 0
        np.add.at(counts, (task[there], answer, data.ranks[rows, answer][there]), 1)
    prompts = np.zeros(len(tasks), dtype=np.int64)
    prompts[task] = data.prompt[rows]
    units, used = counts.reshape(-1, MOST), counts.any(axis=(0, 1))
    named = np.repeat(prompts, MOST)
    filled = units.any(axis=1)
    return ag.krippendorff_alpha(units[filled][:, used], named[filled], seed)


def _first_wins(data: _Data) -> Floats:
    """Of each annotation, by the order in which it was shown (`agreement.first_wins`)."""
    shares = np.zeros(len(data.said))
    for count in np.unique(data.answers):
        rows = data.answers == count
        as_shown = np.take_along_axis(data.ranks[rows], data.shown[rows][:, :count], axis=1)
        shares[rows] = ag.first_wins(as_shown)
    return shares


def _longer_wins(
    data: _Data, real: NDArray[np.bool_], lengths: Mapping[int, int]
) -> Interval | None:
    """Share of strictly ordered pairs of different length that the longer answer wins."""
    wins, prompts = [], []
    for count in np.unique(data.answers[real]):
        rows = np.flatnonzero(real & (data.answers == count))
        size = np.array([[lengths[i] for i in data.said[row].response_ids] for row in rows])
        signs, longer = ag.pair_signs(data.ranks[rows][:, :count]), ag.pair_signs(-size)
        strict = (signs != 0) & (longer != 0)
        wins.append((signs == longer)[strict].astype(np.float64))
        named = np.broadcast_to(data.prompt[rows][:, None], signs.shape)
        prompts.append(named[strict])
    if not wins or not sum(map(len, wins)):
        return None
    return ag.share_by_prompt(np.concatenate(wins), np.concatenate(prompts))


def _accuracy(data: _Data) -> dict[int, float]:
    """One-coin accuracy of each labeller who shares tasks with others."""
    rows = np.unique(np.array(data.shared, dtype=np.int64))
    items, who, labels, number = [], [], [], 0
    for count in np.unique(data.answers[rows]):
        mine = rows[data.answers[rows] == count]
        signs = ag.pair_signs(data.ranks[mine][:, :count])
        _, task = np.unique(data.task[mine], return_inverse=True)
        pairs = signs.shape[1]
        items.append((number + task[:, None] * pairs + np.arange(pairs)).ravel())
        who.append(np.repeat(data.who[mine], pairs))
        labels.append(signs.ravel() + 1)
        number += (int(task.max()) + 1) * pairs
    if not items:
        return {}
    workers = np.concatenate(who)
    model = ag.one_coin(np.concatenate(items), workers, np.concatenate(labels), classes=3)
    return {int(one): float(model.accuracy[one]) for one in np.unique(workers)}


def _records(data: _Data, agreed: Floats, shares: Floats) -> tuple[Record, ...]:
    first, second = _columns(data.shared)
    accuracy = _accuracy(data)
    gold, (consistency, again) = _gold(data), _consistency(data)
    pairs = data.answers * (data.answers - 1) // 2
    shared_rows = np.unique(np.array(data.shared, dtype=np.int64))
    median = float(np.median(data.seconds[data.served])) if data.served.any() else 0.0
    records = []
    for number, name in enumerate(data.names):
        mine = data.who == number
        served = mine & data.served
        count, skipped = int(mine.sum()), data.skipped[name]
        shared = (data.who[first] == number) | (data.who[second] == number)
        wins, p = ag.share_test(shares[served]) if served.sum() > 1 else (None, None)
        right = gold.get(number, [])
        values: dict[str, Any] = {
            "annotations": count,
            "skip_rate": skipped / (count + skipped) if count + skipped else None,
            "agreement": float(agreed[shared].mean()) if shared.any() else None,
            "accuracy": accuracy.get(number),
            "gold_accuracy": float(np.mean(right)) if right else None,
            "gold_pairs": len(right),
            "consistency": float(np.mean(consistency[number])) if number in consistency else None,
            "first_wins": wins,
            "first_wins_p": p,
            "seconds": float(np.median(data.seconds[served])) if served.any() else None,
            "fast": float((data.seconds[served] < FAST * median).mean()) if served.any() else None,
        }
        counts = {
            "gold pairs": len(right),
            "shared pairs": int(pairs[shared_rows[data.who[shared_rows] == number]].sum()),
            "repeated pairs": again[number],
            "served": int(served.sum()),
            "seen": count + skipped,
        }
        records.append(Record(name=name, flags=tuple(_flags(values, counts)), **values))
    return tuple(sorted(records, key=lambda record: record.name))


def _gold(data: _Data) -> dict[int, list[float]]:
    """For each labeller, agreement with gold on each pair that gold orders strictly, ties half."""
    agreements: defaultdict[int, list[float]] = defaultdict(list)
    for row, a in enumerate(data.said):
        if a.kind == "gold" and a.gold_tiers is not None:
            count = len(a.response_ids)
            ranks = np.array([data.ranks[row, :count], ag.ranks_of(a.gold_tiers, count)])
            said, gold = ag.pair_signs(ranks)
            agreements[int(data.who[row])] += (1 - np.abs(said - gold) / 2)[gold != 0].tolist()
    return agreements


def _consistency(data: _Data) -> tuple[dict[int, list[float]], Counter[int]]:
    """For each labeller, pair agreement of each repeated task with the earlier annotation, and the
    number of pairs that those compare."""
    before = {(int(data.who[row]), a.task_id): row for row, a in enumerate(data.said)}
    agreements: defaultdict[int, list[float]] = defaultdict(list)
    pairs: Counter[int] = Counter()
    for row, a in enumerate(data.said):
        who = int(data.who[row])
        if a.repeat_of is not None and (who, a.repeat_of) in before:
            rows = [row, before[who, a.repeat_of]]
            one, two = ag.pair_signs(data.ranks[rows][:, : len(a.response_ids)])
            agreements[who].append(float(ag.pair_agreement(one[None], two[None])[0]))
            pairs[who] += len(one)
    return agreements, pairs


def _flags(r: Mapping[str, Any], counts: Mapping[str, int]) -> Iterable[str]:
    """What an admin should look at; each only with ENOUGH of what it is taken from."""

    def known(name: str, taken_from: str) -> bool:
        return r[name] is not None and counts[taken_from] >= ENOUGH

    if known("gold_accuracy", "gold pairs") and r["gold_accuracy"] < LOW_GOLD:
        yield "often against gold"
    if known("accuracy", "shared pairs") and r["accuracy"] < LOW_ACCURACY:
        yield "often against the others"
    if known("consistency", "repeated pairs") and r["consistency"] < LOW_CONSISTENCY:
        yield "often against own earlier answers"
    if known("first_wins_p", "served") and r["first_wins_p"] < UNLIKELY:
        yield "prefers a place on the page"
    if known("fast", "served") and r["fast"] > MUCH_FAST:
        yield "often very fast"
    if known("skip_rate", "seen") and r["skip_rate"] > MUCH_SKIPPED:
        yield "skips much"
