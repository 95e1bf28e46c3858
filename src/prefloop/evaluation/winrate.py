"""Win rates and means with bootstrap intervals that resample prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from prefloop.config import WinrateConfig
from prefloop.config.checks import validate
from prefloop.config.ranges import template_arguments
from prefloop.data.formats import load
from prefloop.data.sampled import samples, samples_of_list
from prefloop.errors import UserError
from prefloop.files import check_writable, write_atomic
from prefloop.intervals import Grouped, Interval, bootstrap, mean_score
from prefloop.records import Prompt, RowCounts, text_to_json, tools_of
from prefloop.rewards.functions import columns_of


def prompt_win_rate(scores: Sequence[float], baseline: Sequence[float]) -> float:
    """Share of (answer, baseline answer) pairs of one prompt that the answer wins, ties half.

    >>> prompt_win_rate([1.0, 3.0], [1.0, 2.0])
    0.625
    """
    a, b = np.asarray(scores)[:, None], np.asarray(baseline)[None, :]
    return float(((a > b) + 0.5 * (a == b)).mean())


def win_rate(scores: Grouped, baseline: Grouped, seed: int = 0) -> Interval:
    """Win rate against a baseline on the same prompts: every answer against every baseline's."""
    if len(scores) != len(baseline):
        raise ValueError(f"win_rate: {len(scores)} prompts against {len(baseline)}; use the same")
    return bootstrap([prompt_win_rate(a, b) for a, b in zip(scores, baseline, strict=True)], seed)


def run(config: WinrateConfig) -> dict[str, Any]:
    """`prefloop evaluate winrate`: judge two files of answers to the same prompts."""
    from prefloop.rewards.judges import load_judge, require_read

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
    judge.require(row for side in (answers, baseline) for said in side.values() for *_, row in said)
    # 2. Scores.
    sides = []
    for side in (answers, {key: baseline[key] for key in answers}):
        flat = [said for texts in side.values() for said in texts]
        columns = columns_of([row.extra for *_, row in flat])
        asked, ended = [row.prompt for *_, row in flat], [end for _, end, _ in flat]
        scores = iter(judge(asked, [text for text, *_ in flat], ended, columns))
        sides.append([[next(scores) for _ in texts] for texts in side.values()])
    # 3. Win rate and means.
    result = {
        "prompts": len(answers),
        "baseline_prompts_left_out": len(baseline.keys() - answers.keys()),
        "win_rate": asdict(win_rate(sides[0], sides[1], config.seed)),
        "score": asdict(mean_score(sides[0], config.seed)),
        "baseline_score": asdict(mean_score(sides[1], config.seed)),
    }
    if config.output is not None:
        write_atomic(config.output, json.dumps(result, indent=2) + "\n")
    return result


def _read_answers(path: Path, chat: bool = False) -> dict[str, list[tuple[str, bool, Prompt]]]:
    """Each prompt's answers with their rows, {prompt, completion} or {prompt, completions}.

    An answer is its text and whether it ended, as finish reasons say.
    """
    by_prompt: dict[str, list[tuple[str, bool, Prompt]]] = {}
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
