"""`prefloop rank`: a judge puts sampled answers in order, into the records that people's have."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefloop import sources
from prefloop.config import RankConfig
from prefloop.config.checks import validate
from prefloop.config.ranges import is_function, template_arguments
from prefloop.data.formats import parse_row
from prefloop.errors import UserError
from prefloop.files import check_writable, write_jsonl
from prefloop.progress import Progress
from prefloop.provenance import weights_sha256
from prefloop.records import (
    Demonstration,
    Prompt,
    Ranking,
    RowCounts,
    Sampled,
    text_to_json,
    to_json,
)
from prefloop.rewards.functions import columns_of, source_of
from prefloop.rewards.judges import Judge, load_judge, require_read
from prefloop.runs import model_path
from prefloop.terminal import shown

AT_ONCE = 32  # rows scored between two lines of the journal


@dataclass(frozen=True)
class Row:
    """A prompt with its answers, not yet ranked: all in one tier."""

    prompt: Prompt
    answers: Ranking
    texts: tuple[str, ...]

    @property
    def ended(self) -> tuple[bool, ...]:
        """Of each answer, whether it came to its end."""
        return tuple(not one.cut for one in self.sampled)

    @property
    def sampled(self) -> tuple[Sampled, ...]:
        """What is known of each answer."""
        return self.answers.sampled or (Sampled(),) * len(self.texts)


def run(config: RankConfig) -> dict[str, Any]:
    """Scores all answers and writes --output; goes on from where an earlier try was ended."""
    # 1. Rows and judge.
    validate(config)
    check_writable(config.output)
    counts = RowCounts(bad_rows="error" if config.bad_rows == "error" else "list")
    rows = _read(config, counts)
    arguments = template_arguments(config.template_args)
    require_read(arguments, [config.judge])
    judge = load_judge(
        config.judge,
        device=config.device,
        dtype=config.dtype,
        weights=config.weights,
        max_length=config.max_length,
        micro_batch_tokens=config.micro_batch_tokens,
        template_args=arguments,
    )
    judge.require(row.prompt for row in rows)
    # 2. Scores, each chunk of rows kept as soon as it is scored.
    journal = Journal(config.output, _digest(config, rows))
    with Progress("rows judged", len(rows), done=len(journal.scores), leave=False) as progress:
        for start in range(len(journal.scores), len(rows), AT_ONCE):
            chunk = rows[start : start + AT_ONCE]
            journal.add(_scores(judge, chunk))
            progress.advance(len(chunk))
    # 3. Rankings, or the best of each.
    written: list[dict[str, object]] = []
    pairs = 0
    for row, scores in zip(rows, journal.scores, strict=True):
        ranking = replace(row.answers, tiers=tiers_of(scores))
        pairs += len(ranking.pairs())
        counts.tied_pairs += ranking.tied_pairs()
        best = ranking.tiers[0][0]
        if config.form == "rankings":
            written.append(to_json(ranking) | {"labeller": config.judge, "scores": list(scores)})
        elif config.min_score is not None and scores[best] < config.min_score:
            counts.drop(f"best answer below --min-score {config.min_score:g}")
        else:
            said = ranking.completions[best]
            one = Demonstration(ranking.prompt, said, sampled=(row.sampled[best],))
            written.append(to_json(one) | {"judge": config.judge, "score": scores[best]})
    counts.used = len(written)
    if not written:
        raise UserError(f"{config.data}: nothing to write: {counts.summary()}")
    write_jsonl(config.output, written)
    journal.remove()
    print(counts.summary(), file=sys.stderr)
    result = {"output": str(config.output), "rows": len(written), "left_out": dict(counts.dropped)}
    return result | {"pairs": pairs, "tied_pairs": counts.tied_pairs}


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
            rows.append(_row(prompt))
        except UserError as error:
            counts.bad_row(prompt.where, error)
    for where, problem in counts.bad:
        print(shown(f"left out: {where}: {problem}"), file=sys.stderr)
    if not rows:
        raise UserError(f"{config.data}: nothing to rank: {counts.summary()}")
    return rows


def _row(prompt: Prompt) -> Row:
    """A prompt's answers, as rankings read them; UserError where they cannot be ranked."""
    given = prompt.extra.get("completions")
    if not isinstance(given, list) or len(given) < 2:
        raise UserError(
            f"{prompt.where}: `completions` must hold two answers or more to be ranked; sample "
            "with --samples-per-prompt 2 or more"
        )
    asked = {"prompt": text_to_json(prompt.prompt), "tiers": [list(range(len(given)))]}
    (answers,) = parse_row({**prompt.extra, **asked}, prompt.where, "preference")
    assert isinstance(answers, Ranking)
    turns = [said if isinstance(said, str) else said[0].content for said in answers.completions]
    if any(len(said) != 1 for said in answers.completions if not isinstance(said, str)):
        raise UserError(f"{prompt.where}: an answer of several turns cannot be judged; give one")
    others = {k: v for k, v in prompt.extra.items() if k != "completions"}
    return Row(replace(prompt, extra=others), answers, tuple(turns))


def _scores(judge: Judge, rows: Sequence[Row]) -> list[list[float]]:
    """The judge's scores of some rows; equal answers to one prompt are scored once."""
    keys = [list(dict.fromkeys(zip(row.texts, row.ended, strict=True))) for row in rows]
    asked = [row.prompt for row, own in zip(rows, keys, strict=True) for _ in own]
    texts, ended = zip(*(key for own in keys for key in own), strict=True)
    columns = columns_of([row.extra for row in asked])
    found = iter(judge([row.prompt for row in asked], texts, ended, columns))
    scores = []
    for row, own in zip(rows, keys, strict=True):
        known = {key: next(found) for key in own}
        if bad := [score for score in known.values() if not math.isfinite(score)]:
            raise UserError(f"{row.prompt.where}: the judge gave {bad[0]}; give one that is sound")
        scores.append([known[key] for key in zip(row.texts, row.ended, strict=True)])
    return scores


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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(text, encoding="utf-8")

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
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in scores))

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
