"""`prefloop evaluate people`: what people said of a comparison's answers, taken back to it.

The labelling store knows prompts and texts, compare's folder who wrote them.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

import numpy as np

from prefloop.config import PeopleConfig
from prefloop.config.checks import validate
from prefloop.errors import UserError
from prefloop.evaluation.people import (
    PairOfTexts,
    PeopleVerdict,
    Rows,
    agreement,
    preferences,
    sentences_of,
    strengths_of,
)
from prefloop.evaluation.preferences import Judged
from prefloop.evaluation.report import render
from prefloop.evaluation.reread import read_comparison
from prefloop.files import write_atomic
from prefloop.labelling.agreement import ranks_of
from prefloop.labelling.compared import Question, read_compared
from prefloop.labelling.export import (
    deciding,
    is_kept,
    project_id_of,
    require_labellers,
    split_address,
)
from prefloop.labelling.store import Store
from prefloop.labelling.store.reading import Annotation, annotations_of, prompts_of, responses_of
from prefloop.records import RowCounts


@dataclass(frozen=True)
class Task:
    """One task's answers with what people said of them, and the questions that they answer."""

    texts: Sequence[str]
    said: Sequence[Annotation]
    questions: Sequence[Question]


def run(config: PeopleConfig) -> PeopleVerdict:
    """Measure what people said; write people.json, and the verdict into compare.json and page."""
    validate(config)
    folder = Path(config.data)
    verdict = measure_people(config)
    write_atomic(folder / "people.json", json.dumps(asdict(verdict), indent=2) + "\n")
    kept = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    kept["people"] = asdict(verdict)
    write_atomic(folder / "compare.json", json.dumps(kept, indent=2) + "\n")
    write_atomic(folder / "report.html", render(*read_comparison(folder)))
    return verdict


def measure_people(config: PeopleConfig) -> PeopleVerdict:
    """The verdict of `STORE#PROJECT` on the answers in compare's folder."""
    # 1. Who wrote what, and what people said.
    questions = read_compared(config.data)
    ways = tuple(dict.fromkeys(way for question in questions for way in question.said))
    counts = RowCounts()
    tasks, flags = _read(config, questions, counts)
    # 2. As rows: each judgement of each two ways, and of each two texts.
    table = _Table(ways)
    for task in tasks:
        table.add(task)
    if not table.rows:
        raise UserError(
            f"{config.labels}: nothing that people said of answers in {config.data} "
            f"({counts.summary()}); import them with prefloop label import --data {config.data}"
        )
    # 3. The numbers.
    rows = table.as_rows()
    pairs = preferences(rows, ways, _same_texts(questions, ways))
    measured = agreement(rows.pairs)
    used = [a for task in tasks for a in task.said]
    left_out = Counter(counts.dropped)
    if table.flagged_ties:
        left_out["tie with a flagged answer"] += table.flagged_ties
    if unscored := sum(pair.judge is None for pair in rows.pairs):
        left_out["pair that the judge has no score of (for its agreement alone)"] += unscored
    return PeopleVerdict(
        source=config.labels,
        sentences=sentences_of(pairs, ways, measured),
        ways=ways,
        judgements=len(used),
        prompts=len(np.unique(rows.judged.prompts)),
        labellers=len({a.labeller for a in used}),
        pairs=pairs,
        strengths=strengths_of(rows.judged, ways),
        agreement=measured,
        flags=flags,
        all_bad=sum(a.all_bad for a in used),
        left_out=dict(left_out),
        notes=tuple(_notes(used)),
    )


def _notes(used: Sequence[Annotation]) -> list[str]:
    chosen = sum(a.strategy in ("uncertainty", "gap") for a in used)
    return [
        f"{chosen} judgements are of tasks that reward models' scores chose, not chance: they may "
        "not speak for all prompts"
    ] * bool(chosen)


def _same_texts(questions: Sequence[Question], ways: Sequence[str]) -> dict[tuple[int, int], float]:
    """Share of the questions of both ways that both answered alike."""
    shares = {}
    for first, second in combinations(range(len(ways)), 2):
        both = [q.said for q in questions if ways[first] in q.said and ways[second] in q.said]
        same = sum(said[ways[first]].text == said[ways[second]].text for said in both)
        shares[first, second] = same / len(both)
    return shares


# --- reading -------------------------------------------------------------------------------------


def _read(
    config: PeopleConfig, questions: Sequence[Question], counts: RowCounts
) -> tuple[list[Task], dict[str, dict[str, int]]]:
    """The tasks that people judged, and how often each way's answers were flagged as what.

    Flags are counted of skipped tasks too.
    """
    address, project = split_address(config.labels)
    with closing(Store(address, must_exist=True)) as store, store.read() as t:
        project_id = project_id_of(t, project)
        require_labellers(t, config.exclude)
        listed = list(annotations_of(t, project_id))
        prompts, responses = prompts_of(t, project_id), responses_of(t, project_id)
    by_prompt: defaultdict[str, list[Question]] = defaultdict(list)
    for question in questions:
        by_prompt[question.key].append(question)
    tasks: list[Task] = []
    flags: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for _, group in groupby(listed, key=lambda a: a.task_id):
        every = list(group)
        texts = [_text(responses[i]["completion"]) for i in every[0].response_ids]
        asked = by_prompt[json.dumps(prompts[every[0].prompt_id][0])]
        fitting = [q for q in asked if {*texts} <= {said.text for said in q.said.values()}]
        said = [a for a in every if is_kept(a, config.exclude, counts)]
        if not fitting:
            for _ in said:
                counts.drop("of answers that are not in the comparison")
            continue
        for a in every:
            if a.kind == "real" and a.labeller not in config.exclude:
                _count_flags(a, texts, fitting[0], flags)
        if said:
            said = list(deciding(said, counts))
            counts.used += len(said)
            tasks.append(Task(texts, said, fitting))
    return tasks, {way: dict(found) for way, found in flags.items()}


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _count_flags(
    a: Annotation, texts: Sequence[str], question: Question, flags: Mapping[str, Counter[str]]
) -> None:
    """A text that several ways wrote is flagged for each of them."""
    for flag in a.flags:
        if flag["answer"] is None:
            flags[""][flag["flag"]] += 1
            continue
        for way, said in question.said.items():
            if said.text == texts[flag["answer"]]:
                flags[way][flag["flag"]] += 1


# --- rows ----------------------------------------------------------------------------------------


@dataclass
class _Table:
    """Judgements in the making."""

    ways: Sequence[str]
    rows: list[tuple[int, int, float, int, int, int, float | None, float | None]] = field(
        default_factory=list
    )
    pairs: list[PairOfTexts] = field(default_factory=list)
    prompts: dict[str, int] = field(default_factory=dict)
    labellers: dict[str, int] = field(default_factory=dict)
    flagged_ties: int = 0

    def add(self, task: Task) -> None:
        """One task's judgements."""
        prompt = self.prompts.setdefault(task.questions[0].key, len(self.prompts))
        verdicts: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for a in task.said:
            who = self.labellers.setdefault(a.labeller, len(self.labellers))
            signs = self._signs(a, len(task.texts))
            for pair, sign in signs.items():
                verdicts[pair].append(sign)
            for question in task.questions:
                self._add_ways(question, task.texts, signs, prompt, who)
        for (i, j), people in verdicts.items():
            said = {s.text: s for s in task.questions[0].said.values()}
            one, other = said[task.texts[i]], said[task.texts[j]]
            scored = _sign(one.reward_model, other.reward_model)
            judge = _sign(one.judge, other.judge)
            self.pairs.append(PairOfTexts(prompt, people, judge, scored))

    def _signs(self, a: Annotation, count: int) -> dict[tuple[int, int], int]:
        """1, -1 or 0 of each two texts; none where a tie has a flagged side."""
        assert a.tiers is not None
        ranks = ranks_of(a.tiers, count)
        flagged = {flag["answer"] for flag in a.flags}
        signs = {}
        for i, j in combinations(range(count), 2):
            if ranks[i] == ranks[j] and flagged & {i, j, None}:
                self.flagged_ties += 1
            else:
                signs[i, j] = (ranks[j] > ranks[i]) - (ranks[j] < ranks[i])
        return signs

    def _add_ways(
        self,
        question: Question,
        texts: Sequence[str],
        signs: Mapping[tuple[int, int], int],
        prompt: int,
        who: int,
    ) -> None:
        place = {text: i for i, text in enumerate(texts)}
        for (m, first), (n, second) in combinations(enumerate(self.ways), 2):
            if first not in question.said or second not in question.said:
                continue
            one, other = question.said[first], question.said[second]
            i, j = place.get(one.text), place.get(other.text)
            if i is None or j is None or i == j:
                continue
            sign = signs.get((min(i, j), max(i, j)))
            if sign is None:
                continue
            judge = _sign(one.judge, other.judge)
            scored = _sign(one.reward_model, other.reward_model)
            score = (1 + (sign if i < j else -sign)) / 2
            tokens = one.tokens - other.tokens
            self.rows.append((m, n, score, prompt, who, tokens, _half(judge), _half(scored)))

    def as_rows(self) -> Rows:
        """The judgements as columns."""
        first, second, scores, prompts, who, tokens, judge, scored = zip(*self.rows, strict=True)
        judged = Judged(
            np.array(first), np.array(second), np.array(scores), np.array(prompts), np.array(who)
        )
        return Rows(judged, tokens, judge, scored, self.pairs)


def _sign(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else float((one > other) - (one < other))


def _half(sign: float | None) -> float | None:
    return None if sign is None else (1 + sign) / 2
