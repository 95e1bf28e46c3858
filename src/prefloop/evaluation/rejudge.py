"""`prefloop rejudge`: the answers of a comparison, judged by another judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from prefloop.config import CompareConfig, RejudgeConfig
from prefloop.config.checks import validate
from prefloop.config.resolve import build
from prefloop.errors import UserError
from prefloop.evaluation.answers import Row
from prefloop.evaluation.compare import Task, conclude, named_models, prepare
from prefloop.evaluation.comparison import Comparison
from prefloop.evaluation.measure import Answered, ByPrompt, Judged
from prefloop.evaluation.reread import read_comparison
from prefloop.evaluation.verdicts import gold_scores
from prefloop.files import check_folder
from prefloop.generation.remote import engine_for
from prefloop.progress import Progress
from prefloop.records import text_to_json
from prefloop.rewards.health import copied_share
from prefloop.rewards.llm import Answer


def rejudge(config: RejudgeConfig) -> Comparison:
    """Judge and measure anew; writes report.html, compare.json and answers.jsonl."""
    # 1. The comparison, and its prompts as they are read today.
    check_folder(config.output)
    before, rows = read_comparison(config.comparison)
    own = {name: value for name, value in vars(config).items() if name != "comparison"}
    compared = build(CompareConfig, {**before.settings, **own}, str(config.comparison))
    validate(compared)
    task = prepare(replace(compared, reward_model=None), engine_for)  # its scores are kept
    task = replace(task, config=compared)
    runs = _runs(before, rows)
    _require_same_prompts(config, task, [run for way in runs.values() for run in way])
    # 2. Each run's answers; SFT's come first, and are what an LLM compares the others with.
    named = named_models(compared.models)
    answered: list[Answered] = []
    for way in before.ways:
        paths = (compared.sft,) if way is before.ways[0] else named.get(way.name, ())
        n = 1 if paths else compared.best_of
        judged = tuple(_judged(task, run) for run in runs[way.name])
        if not answered:
            texts = [[Answer(a.text, not a.truncated) for a in row] for row in judged[0]]
            task = replace(task, baseline=texts)
        answered.append(Answered(way.name, paths, judged, way.cpu_seconds_per_answer, n))
    # 3. Numbers, and what they say.
    notes = before.notes[:-1] if before.unjudged else before.notes  # the last is of that judge
    note = f"The answers are those of {config.comparison}, judged anew."
    return conclude(task, answered, (*notes, note))


def _runs(before: Comparison, rows: Sequence[Row]) -> dict[str, list[list[Row]]]:
    """The rows of each run of each way, by prompt."""
    found: dict[str, list[list[Row]]] = {
        way.name: [[] for _ in way.runs or (way,)] for way in before.ways
    }
    for row in rows:
        found[row["way"]][row.get("run", 1) - 1].append(row)
    return found


def _require_same_prompts(config: RejudgeConfig, task: Task, runs: Sequence[list[Row]]) -> None:
    prompts = [text_to_json(row.prompt) for row in task.prompts]
    if any([row["prompt"] for row in run] != prompts for run in runs):
        raise UserError(
            f"{task.config.data}: not the prompts of {config.comparison}/answers.jsonl; give both "
            "back as they were, or run `prefloop compare` again"
        )


def _judged(task: Task, rows: Sequence[Row]) -> ByPrompt:
    """A run's answers with the new judge's scores in the place of the old."""
    counts = [len(row["completions"]) for row in rows]
    prompts = [p for p, count in zip(task.prompts, counts, strict=True) for _ in range(count)]
    kept = [
        (text, *rest)
        for row in rows
        for text, *rest in zip(
            *(row[name] for name in ("completions", "tokens", "truncated", "kl", "reward_model")),
            strict=True,
        )
    ]
    answers = [Answer(text, not truncated) for text, _, truncated, _, _ in kept]
    against: Sequence[Sequence[Answer]] = [[answer] for answer in answers]  # SFT's: themselves
    if task.baseline is not None:
        against = [task.baseline[i] for i, count in enumerate(counts) for _ in range(count)]
    with Progress(f"{rows[0]['way']}: judged", len(kept), leave=False) as progress:
        gold = gold_scores(task.judge, prompts, answers, against)
        progress.advance(len(kept))
    ids = [i for i, count in zip(task.prompt_ids, counts, strict=True) for _ in range(count)]
    judged = iter(
        Judged(text, tuple(tokens), copied_share(tokens, asked), truncated, kl, score, proxy)
        for (text, tokens, truncated, kl, proxy), asked, score in zip(kept, ids, gold, strict=True)
    )
    return [[next(judged) for _ in range(count)] for count in counts]
