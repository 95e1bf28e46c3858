"""The answers that `prefloop compare` left, for people to judge.

The store gets prompts and texts alone. Which way (model, or best-of-n) wrote which text stays in
compare's folder, where the verdict finds it again, by prompt and text: what the store does not hold
no page can show.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefloop.errors import UserError
from prefloop.files import read_rows
from prefloop.labelling.store import key_of
from prefloop.records import RowCounts

LISTS = ("completions", "tokens", "judge", "reward_model", "truncated")
"""Columns of answers.jsonl with one value an answer."""


@dataclass(frozen=True)
class Said:
    """A way's answer."""

    text: str
    cut: bool  # it ended at the length limit
    tokens: int
    judge: float | None  # None: it gave none
    reward_model: float | None


@dataclass(frozen=True)
class Question:
    """A prompt, with one answer of each way."""

    where: str
    prompt: Any  # as JSON
    said: Mapping[str, Said]  # by way, in compare's order

    @property
    def key(self) -> str:
        """The prompt's name."""
        return json.dumps(self.prompt)


def is_compared(source: str) -> bool:
    """Whether a source of rows is a folder that `compare` wrote."""
    folder = Path(source)
    return (folder / "answers.jsonl").is_file() and (folder / "compare.json").is_file()


def read_compared(folder: str, samples: int = 0) -> list[Question]:
    """Each prompt with the ways' first answers, then with their second ones, up to `samples`.

    0 takes all. Of a way with several runs these take turns. A way that has fewer answers
    (best-of-n has one) is not in the later questions.
    """
    path = Path(folder) / "answers.jsonl"
    if not is_compared(folder):
        raise UserError(
            f"{folder}: no answers.jsonl and compare.json in it; give --output of prefloop compare"
        )
    rows: defaultdict[tuple[str, int], list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for where, row in read_rows(str(path)):
        rows[str(row.get("way")), row.get("run", 1)].append((where, _checked(row, where)))
    asked = [[row["prompt"] for _, row in listed] for listed in rows.values()]
    ways = list(dict.fromkeys(way for way, _ in rows))
    if len(ways) < 2 or any(prompts != asked[0] for prompts in asked):
        raise UserError(
            f"{path}: two ways or more must answer the same prompts; run prefloop compare again"
        )
    wheres = [where for where, _ in next(iter(rows.values()))]
    questions = []
    for number, prompt in enumerate(asked[0]):
        answers = {
            way: _by_turns([rows[name][number][1] for name in rows if name[0] == way], number)
            for way in ways
        }
        most = max(map(len, answers.values()))
        if samples > most:
            raise UserError(f"--samples {samples}: {path} has {most} answers of a way to a prompt")
        for sample in range(samples or most):
            said = {way: own[sample] for way, own in answers.items() if sample < len(own)}
            questions.append(Question(wheres[number], prompt, said))
    return questions


def _checked(row: dict[str, Any], where: str) -> dict[str, Any]:
    right = all(isinstance(row.get(name), list) for name in LISTS)
    if not right or row.get("way") is None or row.get("prompt") is None:
        needed = ", ".join(("prompt", "way", *LISTS))
        raise UserError(f"{where}: needs {needed}; run prefloop compare again")
    if len({len(row[name]) for name in LISTS}) != 1:
        raise UserError(f"{where}: its lists differ in length; run prefloop compare again")
    return row


def _by_turns(rows: Sequence[Mapping[str, Any]], number: int) -> list[Said]:
    """A way's answers to a prompt, of its runs by turns; each prompt begins with another."""
    turns = [rows[(number + turn) % len(rows)] for turn in range(len(rows))]
    most = max(len(row["completions"]) for row in rows)
    return [_said(row, i) for i in range(most) for row in turns if i < len(row["completions"])]


def _said(row: Mapping[str, Any], sample: int) -> Said:
    text, tokens, judge, reward_model, cut = (row[name][sample] for name in LISTS)
    return Said(text, cut, len(tokens), judge, reward_model)


def compared_rows(
    folder: str, samples: int, counts: RowCounts
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of what people are to judge: a prompt's different texts, which say no more.

    Their order goes by a hash of each text, so that it tells nothing of who wrote which, and the
    same answers give the same task again. A text that several ways wrote stands there once.
    """
    for question in read_compared(folder, samples):
        ended = {said.text: False for said in question.said.values()}
        for said in question.said.values():
            ended[said.text] |= not said.cut
        for _ in range(len(question.said) - len(ended)):
            counts.drop("answer equal to another one")
        if len(ended) < 2:
            counts.drop("prompt that all ways answered alike")
            continue
        texts = sorted(ended, key=lambda text: key_of(question.prompt, text))
        reasons = ["stop" if ended[text] else "length" for text in texts]
        row = {"prompt": question.prompt, "completions": texts, "finish_reasons": reasons}
        yield question.where, row
