"""A judge's verdicts on the answers of rows: scores, or a preference on each two."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from prefloop.config.judging import JudgeQualityConfig, RankConfig, WinrateConfig
from prefloop.config.ranges import template_arguments
from prefloop.data.formats import parse_row
from prefloop.errors import UserError
from prefloop.records import Prompt, Ranking, Sampled, text_to_json
from prefloop.rewards.functions import columns_of
from prefloop.rewards.judges import Judge, load_judge, require_read
from prefloop.rewards.llm import Answer, Pair, PairwiseJudge, Preference, RubricJudge


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


def row_of(prompt: Prompt) -> Row:
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


def judge_of(
    config: RankConfig | JudgeQualityConfig | WinrateConfig, prompts: Iterable[Prompt]
) -> Judge:
    """The judge that scores, which can score answers to these prompts."""
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
        endpoint=config,
    )
    judge.require(prompts)
    return judge


def scores_of(judge: Judge, rows: Sequence[Row]) -> list[list[float]]:
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


def gold_scores(
    judge: Judge | PairwiseJudge,
    rows: Sequence[Prompt],
    answers: Sequence[Answer],
    against: Sequence[Sequence[Answer]],
) -> Sequence[float | None]:
    """A score for each answer, to the prompt of its row; None where an LLM gave none.

    An LLM that compares gives the share of `against`, other answers to the same prompt, that the
    answer wins; None where it gave no verdict on one of them.
    """
    prompts = [row.prompt for row in rows]
    if isinstance(judge, PairwiseJudge):
        pairs = [
            Pair(prompt, answer, other)
            for prompt, answer, others in zip(prompts, answers, against, strict=True)
            for other in others
        ]
        said = iter(judge.prefer(pairs))
        verdicts = [[next(said) for _ in others] for others in against]
        known = [[v.first for v in each if v is not None] for each in verdicts]
        return [
            sum(firsts) / len(firsts) if len(firsts) == len(others) else None
            for firsts, others in zip(known, against, strict=True)
        ]
    texts, ended = [answer.text for answer in answers], [answer.ended for answer in answers]
    if isinstance(judge, RubricJudge):
        return judge.rate(prompts, texts, ended)
    return judge(prompts, texts, ended, columns_of([row.extra for row in rows]))


def ratings_of(judge: RubricJudge, rows: Sequence[Row]) -> list[list[float | None]]:
    """An LLM's scores of each row's answers; None where it gave none."""
    prompts = [row.prompt.prompt for row in rows for _ in row.texts]
    texts = [text for row in rows for text in row.texts]
    given = iter(judge.rate(prompts, texts, [end for row in rows for end in row.ended]))
    return [[next(given) for _ in row.texts] for row in rows]


def preferences_of(judge: PairwiseJudge, rows: Sequence[Row]) -> list[list[Preference | None]]:
    """An LLM's verdicts on each two answers of each row, in the order of `combinations`."""
    pairs = []
    for row in rows:
        answers = [Answer(*said) for said in zip(row.texts, row.ended, strict=True)]
        pairs.append([Pair(row.prompt.prompt, *two) for two in combinations(answers, 2)])
    said = iter(judge.prefer([pair for group in pairs for pair in group]))
    return [[next(said) for _ in group] for group in pairs]
