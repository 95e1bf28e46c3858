"""What the answers of `benchmarks.health_runs` are worth, by gold and by several monitors.

`scores.json` of each run: steps that were measured, and at each of them the scores of the prompts
kept for gold (`gold`; `plain` without its rule on repetition; `repeated`, what the rule looks at)
and of the monitor's prompts by each monitor. None of them is what was optimised:

- `neighbour`: the run's own, the reward model of as many rankings by other annotators;
- `larger`: the neighbour's of the largest label set;
- `one reader`, `four readers`: other annotators, who say of each answer what it is worth to them;
  one reads it, or four do.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import health_runs
from prefloop.evaluation.overoptimisation import Floats
from prefloop.files import read_rows, write_atomic
from prefloop.models.load import load_reward_model
from prefloop.recipes.annotators import Annotator, common_words, draw_annotators
from prefloop.recipes.overoptimisation import Study
from prefloop.rewards.scorers import ModelJudge

FILE = "scores.json"
READERS = 8  # annotators who read what the policy writes, and rank nothing
MICRO_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Answers:
    """To the same prompts, one each, at each of M measurements."""

    prompts: Sequence[str]
    completions: Sequence[Sequence[str]]  # [M][prompts]
    ended: Sequence[Sequence[bool]]

    def by(self, judge: Any) -> Floats:
        """[M, prompts] scores; the judge is one of prompts, completions and whether they ended."""
        pairs = zip(self.completions, self.ended, strict=True)
        return np.array([judge(self.prompts, texts, ended) for texts, ended in pairs])


def answers_of(run: Path, kind: str) -> Answers:
    """Those of a kind, in the order in which they were sampled."""
    rows = [row for _, row in read_rows(run / health_runs.ANSWERS) if row["kind"] == kind]
    return Answers(
        rows[0]["prompts"],
        [[text for (text,) in row["completions"]] for row in rows],
        [[ended for (ended,) in row["ended"]] for row in rows],
    )


@functools.cache
def loaded(source: str) -> ModelJudge:
    """A reward model of the study; they are small, and each is asked for many runs."""
    model = load_reward_model(source, torch.device("cpu"))
    model.module.requires_grad_(False)
    return ModelJudge(model, MICRO_BATCH_TOKENS)


def mean_taste(readers: Sequence[Annotator], first: int, each: int, text: str) -> float:
    """What the words of a text are worth to `each` readers in turn, beside gold."""
    chosen = [readers[(first + k) % len(readers)] for k in range(each)]
    return sum(reader.likes(text) for reader in chosen) / each


@dataclass(frozen=True)
class Scorers:
    """A task's monitors."""

    study: Study
    task: health_runs.Task

    def reward_model(self, labels: int, number: int) -> ModelJudge:
        """Of one label set."""
        return loaded(str(self.study.folder(labels, number) / "reward"))

    def people(self, answers: Answers, each: int) -> Floats:
        """[M, prompts] means of what `each` readers say; a prompt's are always the same."""
        rng = np.random.default_rng([self.study.seed, 0, READERS])
        words, taste = common_words(self.task.sentences), self.study.scale.taste
        readers = draw_annotators(READERS, words, taste, rng)

        def judge(prompts: Sequence[str], texts: Sequence[str], ended: Any) -> list[float]:
            gold = self.task.gold(prompts, texts)
            return [
                g + mean_taste(readers, i * each, each, t)
                for i, (g, t) in enumerate(zip(gold, texts, strict=True))
            ]

        return answers.by(judge)

    def all(self, labels: int, number: int, answers: Answers) -> dict[str, Floats]:
        """[M, prompts] of each monitor of a run."""
        return {
            "neighbour": answers.by(self.reward_model(labels, number ^ 1)),
            "larger": answers.by(self.reward_model(max(health_runs.SIZES), number ^ 1)),
            "one reader": self.people(answers, 1),
            "four readers": self.people(answers, 4),
        }


def score(run: Path, scorers: Scorers, labels: int, number: int, way: str) -> None:
    """Writes `scores.json` of a run that is done; nothing where it is there."""
    if (run / FILE).exists():
        return
    lines = [row for _, row in read_rows(run / "metrics.jsonl")]
    measured = [row for row in lines if row.get("monitor/score") is not None]
    watched, apart = answers_of(run, "monitor"), answers_of(run, "gold")
    task = scorers.task
    plain = apart.by(lambda prompts, texts, ended: task.plain(prompts, texts))
    repeated = np.array([[task.repeated(text) for text in texts] for texts in apart.completions])
    gold = plain - repeated * (plain + 4.0)
    monitors = scorers.all(labels, number, watched)
    own = [row["monitor/score"] for row in measured]
    if not np.allclose(monitors["neighbour"].mean(axis=1), own, atol=1e-3):
        raise SystemExit(f"{run}: its answers do not give the scores that its monitor saw")
    facts = {
        "task": scorers.study.root.name,
        "labels": labels,
        "number": number,
        "way": way,
        "steps": [row["step"] for row in measured],
        "kl": [row["monitor/kl"] for row in measured],
    }
    columns = {"gold": gold, "plain": plain, "repeated": repeated}
    found: Mapping[str, Any] = (
        facts | _lists(columns.items()) | {"monitors": _lists(monitors.items())}
    )
    write_atomic(run / FILE, json.dumps(found) + "\n")


def _lists(columns: Iterable[tuple[str, Floats]]) -> dict[str, Any]:
    return {name: np.round(scores, 6).tolist() for name, scores in columns}


def score_all(folder: Path) -> None:
    """Of all runs below a folder of `benchmarks.health_runs` that are done."""
    for name, make in health_runs.TASKS.items():
        runs = [path.parent for path in sorted((folder / name).glob("labels-*/*/cpu.json"))]
        if not runs:
            continue
        scorers = Scorers(Study(folder / name, 0, health_runs.SCALE), make())
        for run in runs:
            _, labels, number = run.parent.name.split("-")
            score(run, scorers, int(labels), int(number), run.name)
