"""Win rates and means of two files of answers, with intervals over prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from prefloop.config import WinrateConfig
from prefloop.config.checks import validate
from prefloop.config.ranges import is_endpoint
from prefloop.data.formats import load
from prefloop.data.sampled import samples, samples_of_list
from prefloop.errors import UserError
from prefloop.files import check_writable, write_atomic
from prefloop.intervals import Grouped, Interval, estimate, mean_score
from prefloop.records import Prompt, RowCounts, text_to_json, tools_of
from prefloop.rewards.functions import columns_of
from prefloop.rewards.llm import Answer, Pair, RubricJudge, pairwise_judge

Answers = list[tuple[str, bool, Prompt]]
"""Of one prompt: each answer's text, whether it ended, and its row."""


def prompt_win_rate(scores: Sequence[float], baseline: Sequence[float]) -> float:
    """Share of (answer, baseline answer) pairs of one prompt that the answer wins, ties half.

    >>> prompt_win_rate([1.0, 3.0], [1.0, 2.0])
    0.625
    """
    a, b = np.asarray(scores)[:, None], np.asarray(baseline)[None, :]
    return float(((a > b) + 0.5 * (a == b)).mean())


def win_rate(scores: Grouped, baseline: Grouped) -> Interval:
    """Win rate against a baseline on the same prompts: every answer against every baseline's."""
    if len(scores) != len(baseline):
        raise ValueError(f"win_rate: {len(scores)} prompts against {len(baseline)}; use the same")
    rates = [prompt_win_rate(a, b) for a, b in zip(scores, baseline, strict=True)]
    return estimate(rates, resamples=0).share(len(rates))


def run(config: WinrateConfig) -> dict[str, Any]:
    """`prefloop evaluate winrate`: judge two files of answers to the same prompts."""
    # 1. The answers of both sides, by prompt, in the order of the first file.
    validate(config)
    if config.output is not None:
        check_writable(config.output)
    answers, baseline = (
        _read_answers(path, config.chat) for path in (config.answers, config.baseline)
    )
    if missing := [key for key in answers if key not in baseline]:
        raise UserError(
            f"{config.baseline}: no answer to the prompt {missing[0][:80]} of {config.answers}; "
            "both files must answer the same prompts"
        )
    # 2. Verdicts, and the numbers.
    result: dict[str, Any] = {
        "prompts": len(answers),
        "baseline_prompts_left_out": len(baseline.keys() - answers.keys()),
    }
    both = [(said, baseline[key]) for key, said in answers.items()]
    if is_endpoint(config.judge) and config.judge_mode == "pairwise":
        result |= _compared(config, both)
    else:
        result |= _scored(config, both)
    if config.output is not None:
        write_atomic(config.output, json.dumps(result, indent=2) + "\n")
    return result


def _scored(config: WinrateConfig, both: Sequence[tuple[Answers, Answers]]) -> dict[str, Any]:
    """By a judge that scores: win rate and means, over what an LLM gave a score."""
    from prefloop.evaluation.verdicts import judge_of  # loads torch

    judge = judge_of(config, (row for sides in both for side in sides for *_, row in side))
    scored: list[list[list[float | None]]] = []
    for side in zip(*both, strict=True):
        flat = [said for texts in side for said in texts]
        columns = columns_of([row.extra for *_, row in flat])
        asked, ended = [row.prompt for *_, row in flat], [end for _, end, _ in flat]
        texts = [text for text, *_ in flat]
        if isinstance(judge, RubricJudge):
            scores = iter(judge.rate(asked, texts, ended))
        else:
            scores = iter(judge(asked, texts, ended, columns))
        scored.append([[next(scores) for _ in said] for said in side])
    known = [[[s for s in row if s is not None] for row in side] for side in scored]
    whole = [pair for pair in zip(*known, strict=True) if all(pair)]
    _require_verdicts(config, whole)
    own, other = zip(*whole, strict=True)
    result: dict[str, Any] = {
        "win_rate": asdict(win_rate(own, other)),
        "score": asdict(mean_score(own, config.seed)),
        "baseline_score": asdict(mean_score(other, config.seed)),
    }
    if isinstance(judge, RubricJudge):
        result |= {
            "prompts_without_verdict": len(both) - len(own),
            "answers_without_score": sum(s is None for side in scored for r in side for s in r),
            "judge_usage": asdict(judge.endpoint.usage),
        }
    return result


def _compared(config: WinrateConfig, both: Sequence[tuple[Answers, Answers]]) -> dict[str, Any]:
    """By an LLM that compares: each answer with each of the baseline's, in both orders."""
    judge = pairwise_judge(config.judge, config)
    pairs = [
        [
            Pair(row.prompt, Answer(text, end), Answer(other, other_end))
            for text, end, row in own
            for other, other_end, _ in against
        ]
        for own, against in both
    ]
    said = iter(judge.prefer([pair for group in pairs for pair in group]))
    verdicts = [[v for v in (next(said) for _ in group) if v is not None] for group in pairs]
    every = [v for group in verdicts for v in group]
    _require_verdicts(config, every)
    rates = [sum(v.first for v in group) / len(group) for group in verdicts if group]
    return {
        "win_rate": asdict(estimate(rates, resamples=0).share(len(rates))),
        "prompts_without_verdict": len(pairs) - len(rates),
        "pairs_without_verdict": sum(map(len, pairs)) - len(every),
        "order_agreement": sum(v.agreed for v in every) / len(every),
        "judge_usage": asdict(judge.endpoint.usage),
    }


def _require_verdicts(config: WinrateConfig, verdicts: Sequence[object]) -> None:
    if not verdicts:
        raise UserError(f"{config.judge}: no verdict on any prompt; give another judge")


def _read_answers(path: Path, chat: bool = False) -> dict[str, Answers]:
    """Each prompt's answers with their rows, {prompt, completion} or {prompt, completions}.

    An answer is its text and whether it ended, as finish reasons say.
    """
    by_prompt: dict[str, Answers] = {}
    for row in load(str(path), "prompt", RowCounts(), chat):
        texts = row.extra.get("completions", [row.extra.get("completion")])
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
            raise UserError(
                f"{row.where}: columns prompt, {', '.join(row.extra)}; needed are `prompt` and "
                "`completion` (a text) or `completions` (a list of texts)"
            )
        if "completions" in row.extra:
            sampled = samples_of_list(row.extra, row.where, len(texts))
        else:
            sampled = samples(row.extra, row.where, "completion")
        others = {k: v for k, v in row.extra.items() if k not in ("completion", "completions")}
        said = by_prompt.setdefault(
            json.dumps([text_to_json(row.prompt), tools_of(row.prompt)]), []
        )
        own = replace(row, extra=others)
        said += [(text, not (sampled and sampled[i].cut), own) for i, text in enumerate(texts)]
    return by_prompt
