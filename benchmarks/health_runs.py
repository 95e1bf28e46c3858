"""Runs of a small language model that are watched, for `python -m benchmarks health`.

`python -m benchmarks.health_runs --task films --output FOLDER`: PPO on a small model, against
reward models of few annotators with tastes of their own: sizes of label set x label sets x
penalties. Each run is watched by the reward model of its label set's neighbour (0 and 1, 2 and 3:
other annotators, other rankings) and keeps the best step by it. Gold is kept apart from both: at
each measurement other held-out prompts are answered too, and judged when all is over. A run that
is done is not run again; one that was cut off begins anew.

`films`: openings of sentences of film reviews, gold is that of the study of overoptimisation.
`headlines`: openings of headlines, gold is half the log-odds of satire by a classifier of letters,
with the same rule on repetition, of letters. The rule can be taken out: the answers are kept.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import critic_tasks
from prefloop.config import PPOConfig
from prefloop.files import read_rows, write_atomic, write_jsonl
from prefloop.generation import commands
from prefloop.generation.engine import in_process
from prefloop.generation.protocol import EngineConfig, Prompts, RolloutEngine, Sample
from prefloop.generation.sampler import Sampling
from prefloop.models.model import LoadedModel
from prefloop.recipes import sentiment_data
from prefloop.recipes.annotators import (
    Judge,
    common_words,
    draw_annotators,
    gold_judge,
    rank_by_turns,
)
from prefloop.recipes.fetch import fetch_movie_ratings
from prefloop.recipes.overoptimisation import FULL, Study
from prefloop.recipes.small_model import Shape, write_small_model
from prefloop.rewards.health import repeated_share
from prefloop.training import ppo, reward, sft

SIZES = (100, 400)  # ranked prompts of a label set; an annotator ranks 25


@dataclass(frozen=True)
class Way:
    """How a reward model is optimised; an iteration is two steps."""

    kl_coef: float
    kl_target: float = 0.0
    lr: float = 8e-4  # the study of overoptimisation's is 3e-4, for 80 iterations
    iterations: int = 30
    seed: int = 0  # beside the label set's number


WAYS = {
    "0.03": Way(0.03),
    "0.1": Way(0.1),
    "adaptive": Way(0.1, 8.0),
    "none": Way(0.0),
    "none-faster": Way(0.0, lr=1.4e-3),
    "none-longer": Way(0.0, lr=1.4e-3, iterations=50, seed=100),
}
WATCHED, APART = 64, 128  # held-out prompts that the monitor sees, and that gold alone judges
EVERY = 5  # steps between measurements
SCALE = replace(
    FULL,
    shape=Shape(layers=2),  # 0.8 million weights
    pretraining_epochs=3.0,
    max_new_tokens=20,
)
ANSWERS = "watched.jsonl"  # in a run's directory: all that was sampled


@dataclass(frozen=True)
class Task:
    """Sentences to learn from, prompts by use, and judges that nobody optimises.

    Gold is `plain`, a classifier, as far as an answer says something new: with r what stood in it
    before, plain - r (plain + 4), as in the study of overoptimisation. `taught` is what annotators
    see beside their tastes, of answers that hardly repeat themselves.
    """

    sentences: Sequence[str]
    demonstrations: Sequence[dict[str, str]]
    prompts: dict[str, list[str]]  # preference, ppo, evaluation
    plain: Judge
    repeated: Callable[[str], float]
    taught: Judge

    def gold(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """See Judge."""
        scores = zip(self.plain(prompts, completions), completions, strict=True)
        return [plain - self.repeated(text) * (plain + 4.0) for plain, text in scores]


def films() -> Task:
    """The study of overoptimisation's."""
    parts = sentiment_data.split(fetch_movie_ratings())
    return Task(
        [s.text for name in ("gold", "sft") for s in parts[name]],
        sentiment_data.demonstrations(parts["sft"]),
        {name: sentiment_data.prompts(parts[name]) for name in ("preference", "ppo", "evaluation")},
        sentiment_data.gold_reward,
        lambda text: repeated_share(sentiment_data.WORD.findall(text.lower()), 2),
        gold_judge,
    )


def headlines() -> Task:
    """Of `critic_tasks`, with gold in the unit of the annotators' tastes."""
    parts = critic_tasks.headlines()
    fitting = {
        name: [text for text, _ in part if 6 <= len(text.split(" ")) <= 14]
        for name, part in parts.items()
    }

    def cut(text: str) -> str:
        return sentiment_data.opening(text, 3)

    return Task(
        [text for name in ("taste", "sft") for text, _ in parts[name]],
        [{"prompt": cut(text), "completion": text[len(cut(text)) :]} for text in fitting["sft"]],
        {
            name: list(dict.fromkeys(map(cut, fitting[name])))
            for name in ("preference", "ppo", "evaluation")
        },
        satire,
        lambda text: repeated_share(text, 4),
        satire,
    )


def satire(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Half the log-odds of satire."""
    return [odds / 2 for odds in critic_tasks.headline_judge(prompts, completions)]


TASKS: dict[str, Callable[[], Task]] = {"films": films, "headlines": headlines}


class Apart:
    """A RolloutEngine that keeps what it samples, and answers other prompts at each measurement.

    A line a call: `kind` is rollout, monitor or gold; `ended` has True for an answer that stopped.
    """

    def __init__(
        self, engine: RolloutEngine, model: LoadedModel, file: Path, others: Prompts
    ) -> None:
        """`others` are the prompts for gold."""
        self.engine, self.model, self.file, self.others = engine, model, file, others
        self.version = 0  # of the weights: -1 at a measurement

    def sync(self, model: LoadedModel, version: int) -> None:
        """See RolloutEngine."""
        self.version = version
        self.engine.sync(model, version)

    def generate(
        self,
        prompts: Prompts,
        n: int,
        sampling: Sampling,
        seed: int,
        numbers: Sequence[int] | None = None,
        on_done: Callable[[Sample], None] | None = None,
    ) -> list[list[Sample]]:
        """See RolloutEngine."""
        if self.version != -1:
            groups = self.engine.generate(prompts, n, sampling, seed, numbers, on_done)
            self._keep("rollout", prompts, groups)
            return groups
        count = len(prompts)
        every, places = [*prompts, *self.others], range(count + len(self.others))
        groups = self.engine.generate(every, n, sampling, seed, places)  # at once, to be quick
        self._keep("monitor", prompts, groups[:count])
        self._keep("gold", self.others, groups[count:])
        return groups[:count]

    def _keep(self, kind: str, prompts: Prompts, groups: Sequence[Sequence[Sample]]) -> None:
        decode = self.model.encoder.decode
        line = {
            "kind": kind,
            "prompts": [decode(ids) for ids in prompts],
            "completions": [[decode(one.tokens) for one in group] for group in groups],
            "ended": [[one.finish_reason == "stop" for one in group] for group in groups],
        }
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line, ensure_ascii=False) + "\n")


def write_policy(study: Study, task: Task) -> None:
    """Random weights learn all sentences, then short ones from their openings; then it answers."""
    rows: dict[str, Any] = {
        "base": [
            {"prompt": first, "completion": text[len(first) :]}
            for text in task.sentences
            if (first := sentiment_data.opening(text, 1)) != text
        ],
        "sft": task.demonstrations,
        "watched": _as_rows(task.prompts["evaluation"][:WATCHED]),
    }
    rows |= {name: _as_rows(task.prompts[name]) for name in ("preference", "ppo")}
    for name, part in rows.items():
        write_jsonl(study.root / "data" / f"{name}.jsonl", part)
    scale, bare = study.scale, study.root / "random"
    if not bare.exists():
        write_small_model(task.sentences, bare, scale.shape, study.seed)
    sft.run(study.sft("base", str(bare), "all", scale.pretraining_epochs, lr=2e-3))
    sft.run(study.sft("sft", str(study.root / "base"), "answer", scale.sft_epochs, scale.sft_lr))
    if not study.samples.exists():
        commands.sample(study.sampling("preference", study.samples, 4, 0))


def _as_rows(prompts: Sequence[str]) -> list[dict[str, str]]:
    return [{"prompt": prompt} for prompt in prompts]


def train_reward_model(study: Study, task: Task, labels: int, number: int) -> None:
    """From rankings of `labels` prompts by as many annotators as that takes."""
    folder, scale = study.folder(labels, number), study.scale
    if not (rankings := folder / "rankings.jsonl").exists():
        rng = np.random.default_rng([study.seed, labels, number])
        people = max(1, round(labels / scale.prompts_each))
        annotators = draw_annotators(people, common_words(task.sentences), scale.taste, rng)
        prompts = rng.permutation(sum(1 for _ in read_rows(study.samples)))[:labels].tolist()
        rank_by_turns(study.samples, rankings, annotators, scale.flips, prompts, task.taught, rng)
    reward.run(study.reward(folder, number))


def settings(study: Study, labels: int, number: int, way: str) -> PPOConfig:
    """Of one run; its monitor is the reward model of another label set, its neighbour's."""
    folder = study.folder(labels, number)
    how = WAYS[way]
    config = study.ppo(folder, "adaptive penalty" if how.kl_target else "no penalty", number)
    return replace(
        config,
        output=folder / way,
        kl_coef=how.kl_coef,
        kl_target=how.kl_target,
        lr=how.lr,
        max_steps=how.iterations * config.ppo_epochs,
        seed=number + how.seed,
        monitor=str(study.folder(labels, number ^ 1) / "reward"),
        monitor_data=str(study.root / "data" / "watched.jsonl"),
        monitor_steps=EVERY,
        max_concurrent=256,
        keep_best=True,
    )


def watch(config: PPOConfig, prompts: Sequence[str]) -> None:
    """One run, from its start to its end; nothing where it is there."""
    if (done := config.output / "cpu.json").exists():
        return
    shutil.rmtree(config.output, ignore_errors=True)
    before = _cpu()

    def recording(asked: EngineConfig, model: LoadedModel) -> RolloutEngine:
        ids = [model.encoder.prompt(prompt) for prompt in prompts]
        return Apart(in_process(asked, model), model, config.output / ANSWERS, ids)

    ppo.run(config, recording)
    for name in ("checkpoints", "model"):  # many runs fill a disk
        shutil.rmtree(config.output / name, ignore_errors=True)
    write_atomic(done, json.dumps({"cpu_seconds": round(_cpu() - before, 1)}) + "\n")


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Policy, and for each pair of label sets their reward models and then their runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.health_runs", description=__doc__)
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pairs", type=int, nargs="+", default=[0, 1], help="of label sets")
    parser.add_argument("--ways", choices=list(WAYS), nargs="+", default=list(WAYS))
    asked = parser.parse_args()
    task, study = TASKS[asked.task](), Study(asked.output / asked.task, 0, SCALE)
    write_policy(study, task)
    apart = task.prompts["evaluation"][WATCHED : WATCHED + APART]
    for pair in asked.pairs:
        sets = [(labels, number) for number in (2 * pair, 2 * pair + 1) for labels in SIZES]
        for labels, number in sets:
            train_reward_model(study, task, labels, number)
        for labels, number in sets:
            for way in asked.ways:
                watch(settings(study, labels, number, way), apart)


if __name__ == "__main__":
    main()
