"""The forms of exported rows: rankings, pairs, transcripts, single labelled answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prefloop.config.labelling import Form
from prefloop.records import Comparison, Ranking, RowCounts, Sampled, Text, Unpaired, to_json

GOOD, BAD = 5, 3
"""In rating mode an answer is desirable from GOOD on and undesirable up to BAD (of 1 to 7)."""


STRENGTHS = {1: 1 / 3, 2: 2 / 3, 3: 1.0}  # slightly, clearly, much better
CONFIDENCES = {1: 0.0, 2: 0.5, 3: 1.0}  # unsure, fairly sure, sure


def margin_of(strength: int | None, confidence: int | None) -> float:
    """By how much a better answer should outscore a worse one, by what a labeller said: in [0, 1].

    The strength's share (Llama 2's small margins, arXiv 2307.09288, table 27) times the
    confidence's. Strength unsaid, as in rankings, counts as clearly; confidence unsaid as sure.

    >>> margin_of(3, 2), margin_of(None, None)
    (0.5, 0.0)
    """
    if strength is None and confidence is None:
        return 0.0
    return STRENGTHS[strength or 2] * CONFIDENCES[confidence or 3]


@dataclass(frozen=True)
class Decision:
    """A task's answers with an order, from one labeller or from all."""

    ranking: Ranking
    labeller: str  # "" where all labellers were asked
    confidence: int | None
    all_bad: bool
    ratings: Sequence[int] | None


def form_rows(form: Form, decision: Decision, counts: RowCounts) -> list[dict[str, object]]:
    """The rows that a decision gives in one form."""
    ranking = decision.ranking
    prompt, answers = ranking.prompt, ranking.completions
    if form == "rankings":
        origin = {"labeller": decision.labeller} if decision.labeller else {}
        sure = {"confidence": decision.confidence} if decision.confidence else {}
        return [to_json(ranking) | origin | sure]
    sampled = ranking.sampled or (Sampled(),) * len(answers)
    rows: list[dict[str, object]] = []
    if form == "kto":
        for i, label in enumerate(_labels(decision, counts)):
            if label is not None and _readable([answers[i]], [sampled[i]], counts):
                rows.append(to_json(Unpaired(prompt, answers[i], label, sampled=(sampled[i],))))
        return rows
    if not ranking.pairs():
        counts.drop("ranking whose answers all tie (gives no pairs)")
    if form == "dpo":
        for w, l in ranking.pairs():
            pair = answers[w], answers[l]
            if pair[0] == pair[1]:
                counts.drop("pair of equal answers")
            elif _readable(pair, (sampled[w], sampled[l]), counts):
                both = (sampled[w], sampled[l])
                rows.append(to_json(Comparison(prompt, *pair, margin=ranking.margin, sampled=both)))
        return rows
    return [
        {"chosen": _transcript(prompt, answers[w]), "rejected": _transcript(prompt, answers[l])}
        for w, l in ranking.pairs()
    ]


def _readable(answers: Sequence[Text], sampled: Sequence[Sampled], counts: RowCounts) -> bool:
    """Whether training would take the answers; counted where not."""
    for answer, one in zip(answers, sampled, strict=True):
        text = answer if isinstance(answer, str) else answer[0].content
        if not (text.strip() or one.finish_reason or one.ids):
            counts.drop("empty answer that nothing says was sampled")
            return False
    return True


def _labels(decision: Decision, counts: RowCounts) -> list[bool | None]:
    """Desirable, undesirable, or (None) neither, of each answer.

    By ratings where there are; else the best tier is desirable and the worst is not, and nothing is
    where all are bad.
    """
    tiers, count = decision.ranking.tiers, len(decision.ranking.completions)
    if decision.ratings is not None:
        labels = [True if r >= GOOD else False if r <= BAD else None for r in decision.ratings]
    elif decision.all_bad:
        labels = [False] * count
    elif len(tiers) == 1:
        labels = [None] * count
    else:
        labels = [
            True if i in tiers[0] else False if i in tiers[-1] else None for i in range(count)
        ]
    for label in labels:
        if label is None:
            counts.drop("answer that is neither desirable nor undesirable")
    return labels


def _transcript(prompt: Text, answer: Text) -> str:
    """HH's form: turns of Human and Assistant."""
    if isinstance(prompt, str):
        turns = [("user", prompt)]
    else:
        turns = [(message.role, message.content) for message in prompt]
    turns.append(("assistant", answer if isinstance(answer, str) else answer[0].content))
    names = {"assistant": "Assistant", "system": "System"}
    if isinstance(prompt, str) and prompt.rstrip().endswith("Assistant:"):
        return prompt + str(turns[-1][1])  # it is a transcript already
    return "".join(f"\n\n{names.get(role, 'Human')}: {text.strip()}" for role, text in turns)
