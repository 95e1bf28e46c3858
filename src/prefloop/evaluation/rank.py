"""`prefloop rank`: a judge puts sampled answers in order, into the records that people's have."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from prefloop import sources
from prefloop.config import RankConfig
from prefloop.config.checks import validate
from prefloop.config.ranges import is_endpoint, is_function
from prefloop.errors import UserError
from prefloop.evaluation.verdicts import (
    Row,
    judge_of,
    preferences_of,
    ratings_of,
    row_of,
    scores_of,
)
from prefloop.files import append, check_writable, write_atomic, write_jsonl
from prefloop.labelling.agreement import copeland
from prefloop.progress import Progress
from prefloop.provenance import weights_sha256
from prefloop.records import Demonstration, RowCounts, text_to_json, to_json
from prefloop.rewards.endpoint import Usage
from prefloop.rewards.functions import source_of
from prefloop.rewards.llm import pairwise_judge, rubric_judge
from prefloop.runs import model_path
from prefloop.terminal import shown

AT_ONCE = 32  # rows scored between two lines of the journal


class Order(NamedTuple):
    """Answers by a judge's verdict, with their scores where it gave some."""

    tiers: tuple[tuple[int, ...], ...]
    scores: Sequence[float] = ()


def run(config: RankConfig) -> dict[str, Any]:
    """Scores all answers and writes --output; goes on from where an earlier try was ended."""
    # 1. Rows.
    validate(config)
    check_writable(config.output)
    counts = RowCounts(bad_rows="error" if config.bad_rows == "error" else "list")
    rows = _read(config, counts)
    # 2. The judge's verdicts.
    journal = None
    if not is_endpoint(config.judge):
        journal = Journal(config.output, _digest(config, rows))
        orders, usage = _scored(config, rows, journal), None
    elif config.judge_mode == "rubric":
        orders, usage = _rated(config, rows)
    else:
        orders, usage = _compared(config, rows)
    # 3. Rankings, or the best of each.
    written: list[dict[str, object]] = []
    pairs = 0
    for row, order in zip(rows, orders, strict=True):
        if order is None:
            counts.drop("no verdict of the judge")
            continue
        ranking = replace(row.answers, tiers=order.tiers)
        pairs += len(ranking.pairs())
        counts.tied_pairs += ranking.tied_pairs()
        best = ranking.tiers[0][0]
        scores = {"scores": list(order.scores)} if order.scores else {}
        if config.form == "rankings":
            written.append(to_json(ranking) | {"labeller": config.judge} | scores)
        elif config.min_score is not None and order.scores[best] < config.min_score:
            counts.drop(f"best answer below --min-score {config.min_score:g}")
        else:
            said = ranking.completions[best]
            one = Demonstration(ranking.prompt, said, sampled=(row.sampled[best],))
            score = {"score": order.scores[best]} if order.scores else {}
            written.append(to_json(one) | {"judge": config.judge} | score)
    counts.used = len(written)
    if not written:
        raise UserError(f"{config.data}: nothing to write: {counts.summary()}")
    write_jsonl(config.output, written)
    if journal:
        journal.remove()
    print(counts.summary(), file=sys.stderr)
    result = {"output": str(config.output), "rows": len(written), "left_out": dict(counts.dropped)}
    result |= {"pairs": pairs, "tied_pairs": counts.tied_pairs}
    return result | ({"judge_usage": asdict(usage)} if usage else {})


def _scored(config: RankConfig, rows: Sequence[Row], journal: Journal) -> list[Order | None]:
    """By a model's or a function's scores, each chunk of rows kept as soon as it is scored."""
    judge = judge_of(config, (row.prompt for row in rows))
    with Progress("rows judged", len(rows), done=len(journal.scores), leave=False) as progress:
        for start in range(len(journal.scores), len(rows), AT_ONCE):
            chunk = rows[start : start + AT_ONCE]
            journal.add(scores_of(judge, chunk))
            progress.advance(len(chunk))
    return [Order(tiers_of(scores), scores) for scores in journal.scores]


def _rated(config: RankConfig, rows: Sequence[Row]) -> tuple[list[Order | None], Usage]:
    """By an LLM's scores; its cache is what an ended try goes on from."""
    judge = rubric_judge(config.judge, config)
    orders: list[Order | None] = []
    for scores in ratings_of(judge, rows):
        known = [score for score in scores if score is not None]
        whole = len(known) == len(scores)
        orders.append(Order(tiers_of(known), known) if whole else None)
    return orders, judge.endpoint.usage


def _compared(config: RankConfig, rows: Sequence[Row]) -> tuple[list[Order | None], Usage]:
    """By an LLM's verdict on each two answers, in both orders: pairs won less pairs lost."""
    judge = pairwise_judge(config.judge, config)
    orders: list[Order | None] = []
    for row, verdicts in zip(rows, preferences_of(judge, rows), strict=True):
        votes = [v.first - 0.5 for v in verdicts if v is not None]
        whole = len(votes) == len(verdicts)
        tiers = copeland(votes, len(row.texts)) if whole else []
        orders.append(Order(tuple(map(tuple, tiers))) if whole else None)
    return orders, judge.endpoint.usage


def tiers_of(scores: Sequence[float]) -> tuple[tuple[int, ...], ...]:
    """Answers by their scores, best first, equal ones in one tier.

    >>> tiers_of([0.5, 2.0, 0.5])
    ((1,), (0, 2))
    """
    levels = sorted(set(scores), reverse=True)
    return tuple(tuple(i for i, score in enumerate(scores) if score == level) for level in levels)


def _read(config: RankConfig, counts: RowCounts) -> list[Row]:
    rows = []
    for prompt in sources.load(config.data, "prompt", counts, config.chat):
        try:
            rows.append(row_of(prompt))
        except UserError as error:
            counts.bad_row(prompt.where, error)
    for where, problem in counts.bad:
        print(shown(f"left out: {where}: {problem}"), file=sys.stderr)
    if not rows:
        raise UserError(f"{config.data}: nothing to rank: {counts.summary()}")
    return rows


# --- going on ------------------------------------------------------------------------------------


class Journal:
    """Scores of the rows judged so far, in a file beside --output; gone once that is written."""

    def __init__(self, output: Path, digest: str) -> None:
        """Takes up what was written for the same rows and judge; else begins anew."""
        self.path = output.with_name(f"{output.name}.partial")
        self.scores: list[list[float]] = []
        lines = list(self._lines())
        if lines and lines[0] == digest:
            self.scores = lines[1:]
            note = f"{self.path}: goes on after {len(self.scores)} rows"
        else:
            note = f"{self.path}: of other rows or another judge; begun anew" if lines else ""
        if note:
            print(shown(note), file=sys.stderr)
        text = "".join(json.dumps(line) + "\n" for line in [digest, *self.scores])
        write_atomic(self.path, text)

    def _lines(self) -> Iterator[Any]:
        """The lines that were written whole."""
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
                try:
                    yield json.loads(line)
                except ValueError:
                    return

    def add(self, scores: Sequence[list[float]]) -> None:
        """Keeps the scores of the next rows."""
        self.scores += scores
        append(self.path, "".join(json.dumps(line) + "\n" for line in scores))

    def remove(self) -> None:
        """The output stands."""
        self.path.unlink()


def _digest(config: RankConfig, rows: Sequence[Row]) -> str:
    """Of the rows, and of what scores them: settings, weights, a function's file."""
    names = ("judge", "max_length", "dtype", "weights", "template_args")
    settings = {name: getattr(config, name) for name in names}
    if is_function(config.judge):
        file = source_of(config.judge)
        content = hashlib.sha256(file.read_bytes()).hexdigest() if file else ""
    else:
        content = weights_sha256(Path(model_path(config.judge)))
    digest = hashlib.sha256(json.dumps([settings, content], sort_keys=True).encode())
    for row in rows:
        said = [text_to_json(row.prompt.prompt), row.texts, row.ended, row.prompt.extra]
        digest.update(json.dumps(said, sort_keys=True, default=str).encode())
    return digest.hexdigest()
