"""`prefloop overoptimise`: a reward model of few, varying people's rankings is optimised too far.

Read `overoptimise` downward. A language model learns to write sentences of film reviews; a
few simulated annotators, each with a taste of its own, rank some of its answers; a reward model
learns from that; PPO and best-of-n optimise it, while a judge that nobody optimises says what the
answers are worth. Stages that are done are skipped when the command is given again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from prefloop.config import (
    OveroptimiseConfig,
    PPOConfig,
    RankConfig,
    RewardConfig,
    SampleConfig,
    SFTConfig,
)
from prefloop.config.ranges import DType
from prefloop.errors import UserError
from prefloop.evaluation.overoptimisation import Point
from prefloop.files import check_folder, read_rows, write_atomic, write_jsonl
from prefloop.generation.protocol import EngineConfig, RolloutEngine
from prefloop.models.model import LoadedModel
from prefloop.recipes import sentiment_data
from prefloop.recipes.annotators import (
    Judge,
    common_words,
    draw_annotators,
    gold_judge,
    rank_by_turns,
)
from prefloop.recipes.fetch import fetch_movie_ratings, require_packages
from prefloop.recipes.overoptimisation_report import BEST_OF_N, write_report
from prefloop.recipes.recorder import Recorder
from prefloop.recipes.sentiment_data import Floats, gold_reward
from prefloop.recipes.small_model import Shape, write_small_model

log = logging.getLogger("prefloop")
GOLD = "prefloop.recipes.annotators:gold_judge"
ANSWERS = "answers.jsonl"  # in a PPO run's directory: what each iteration sampled
WAYS = {"no penalty": (0.0, 0.0), "fixed penalty": (0.1, 0.0), "adaptive penalty": (0.1, 8.0)}
"""KL coefficient and target of each PPO run."""


@dataclass(frozen=True)
class Scale:
    """The numbers of the study; `quick` only shows that everything runs."""

    shape: Shape = field(default_factory=Shape)
    pretraining_epochs: float = 5.0
    sft_epochs: float = 2.0
    sft_lr: float = 5e-4
    prompts_each: int = 25  # that an annotator ranks
    taste: float = 0.6  # deviation of a word's weight, in points of the gold score
    flips: float = 0.1  # share of rankings that are upside down
    reward_epochs: float = 4.0
    reward_lr: float = 1e-3
    iterations: int = 80
    ppo_prompts: int = 16
    ppo_lr: float = 3e-4
    lora_rank: int = 0
    judged_prompts: int = 64  # for best-of-n
    n: int = 256
    max_new_tokens: int = 24


FULL = Scale()
QUICK = Scale(
    shape=Shape(400, 32, 1, 2),
    pretraining_epochs=0.02,
    sft_epochs=0.02,
    prompts_each=4,
    reward_epochs=1.0,
    iterations=3,
    ppo_prompts=4,
    judged_prompts=4,
    n=8,
    max_new_tokens=8,
)
ON_A_MODEL: dict[str, Any] = {
    "sft_lr": 5e-5,
    "reward_lr": 5e-4,
    "ppo_lr": 1e-3,
    "lora_rank": 16,
}
"""What a model that is given gets, as the demo's does."""
OF_IT = 64
"""The most answers that best-of-n chooses from, then."""


@dataclass(frozen=True)
class Study:
    """Where everything stands, and the settings of every stage."""

    root: Path
    seed: int
    scale: Scale
    model: str | None = None  # to begin from

    @property
    def policy(self) -> str:
        """The SFT model."""
        return str(self.root / "sft")

    @property
    def samples(self) -> Path:
        """Four answers to each prompt that can be ranked."""
        return self.root / "samples.jsonl"

    @property
    def many(self) -> Path:
        """The answers that best-of-n chooses from."""
        return self.root / "many.jsonl"

    def folder(self, labels: int, repeat: int) -> Path:
        """Of one label set: its rankings and what comes of them."""
        return self.root / f"labels-{labels}-{repeat}"

    @property
    def dtype(self) -> DType:
        """What little models lose by bfloat16 is more than they gain."""
        return "auto" if self.model else "float32"

    def sft(self, name: str, model: str, train_on: Any, epochs: float, lr: float) -> SFTConfig:
        """Of random weights on all sentences, and of what comes out, or is given, on short ones."""
        return SFTConfig(
            model=model,
            data=str(self.root / "data" / f"{name}.jsonl"),
            output=self.root / name,
            train_on=train_on,
            seed=self.seed,
            epochs=epochs,
            lr=lr,
            batch_size=32,
            max_length=128,
            truncation="drop",
            dtype=self.dtype,
        )

    def sampling(self, data: str, output: Path, each: int, most: int) -> SampleConfig:
        """Answers of the SFT model."""
        return SampleConfig(
            model=self.policy,
            data=str(self.root / "data" / f"{data}.jsonl"),
            output=output,
            samples_per_prompt=each,
            max_prompts=most,
            max_new_tokens=self.scale.max_new_tokens,
            max_concurrent=256,
            max_length=128,
            seed=self.seed,
            dtype=self.dtype,
        )

    def scoring(self, judge: str, output: Path) -> RankConfig:
        """A judge's scores of the answers that best-of-n chooses from."""
        return RankConfig(data=str(self.many), judge=judge, output=output)

    def reward(self, folder: Path, seed: int) -> RewardConfig:
        """From one label set."""
        return RewardConfig(
            model=self.policy,
            data=str(folder / "rankings.jsonl"),
            output=folder / "reward",
            seed=seed,
            epochs=self.scale.reward_epochs,
            batch_size=8,
            lr=self.scale.reward_lr,
            lora_rank=self.scale.lora_rank,
            center_coefficient=0.01,
            max_length=128,
            dtype=self.dtype,
        )

    def ppo(self, folder: Path, way: str, seed: int) -> PPOConfig:
        """The ways differ in the KL penalty only; the others' mean is the baseline (RLOO)."""
        kl_coef, kl_target = WAYS[way]
        passes = 2
        return PPOConfig(
            model=self.policy,
            ref_model=None if self.model else self.policy,  # KL is told without a penalty, too
            data=str(self.root / "data" / "ppo.jsonl"),
            output=folder / way.replace(" ", "-"),
            reward_model=str(folder / "reward"),
            seed=seed,
            kl_coef=kl_coef,
            kl_target=kl_target,
            kl_horizon=1000.0 if kl_target else PPOConfig.kl_horizon,
            max_steps=self.scale.iterations * passes,
            ppo_epochs=passes,
            batch_size=self.scale.ppo_prompts,
            samples_per_prompt=4,
            advantage="rloo",
            max_new_tokens=self.scale.max_new_tokens,
            lr=self.scale.ppo_lr,
            lora_rank=self.scale.lora_rank,
            max_length=128,
            dtype=self.dtype,
        )


def overoptimise(config: OveroptimiseConfig) -> dict[str, Any]:
    """Run the study under `config.output`; returns what stands in its summary.json."""
    require_packages("sklearn")
    check_folder(config.output)
    study = study_of(config)
    _same_study(study)
    # 1. A language model that writes sentences of film reviews, and its answers.
    sentences = _prepare(study)
    _write_policy(study, sentences, max(config.sizes))
    points: list[dict[str, Any]] = []
    for labels, repeat in label_sets(config):
        # 2. A few annotators, and a reward model of what they like.
        folder, seed = study.folder(labels, repeat), config.seed + repeat
        log.info("%d ranked prompts, label set %d", labels, repeat + 1)
        _train_reward_model(study, folder, labels, seed, sentences)
        # 3. It is optimised, by choice among many answers and by PPO; gold looks on.
        facts = {"labels": labels, "repeat": repeat}
        points += [facts | row for row in best_of_n(study, folder)]
        for way in WAYS:
            points += [facts | row for row in _optimise(study, folder, way, seed)]
    # 4. Points, fits, the falls from the peak, and a figure.
    write_jsonl(config.output / "points.jsonl", points)
    return write_report(points, config.output)


def study_of(config: OveroptimiseConfig) -> Study:
    """What the settings ask for."""
    scale = QUICK if config.quick else FULL
    if config.model is not None:
        scale = replace(scale, n=min(scale.n, OF_IT), **ON_A_MODEL)
    return Study(config.output, config.seed, scale, config.model)


def label_sets(config: OveroptimiseConfig) -> list[tuple[int, int]]:
    """(ranked prompts, number) of each, small ones first."""
    return [(labels, i) for labels in sorted(set(config.sizes)) for i in range(config.repeats)]


def _same_study(study: Study) -> None:
    """Files of a study with other numbers must not be taken for this one's."""
    path = study.root / "study.json"
    facts = {"seed": study.seed, "ways": WAYS} | asdict(study.scale)
    facts |= {"model": study.model} if study.model is not None else {}
    text = json.dumps(facts, indent=2) + "\n"
    if not path.exists():
        write_atomic(path, text)
    elif path.read_text(encoding="utf-8") != text:
        raise UserError(f"{study.root} holds a study of other settings; give another --output")


def _prepare(study: Study) -> list[str]:
    """Writes the rows of every stage; returns the sentences that the model learns from."""
    parts = sentiment_data.split(fetch_movie_ratings())
    sentences = [s.text for name in ("gold", "sft") for s in parts[name]]
    rows: dict[str, list[dict[str, str]]] = {
        "base": [
            {"prompt": first, "completion": text[len(first) :]}
            for text in sentences
            if (first := sentiment_data.opening(text, 1)) != text
        ],
        "sft": sentiment_data.demonstrations(parts["sft"]),
    }
    for name in ("preference", "ppo", "evaluation"):
        rows[name] = [{"prompt": prompt} for prompt in sentiment_data.prompts(parts[name])]
    for name, part in rows.items():
        if not (path := study.root / "data" / f"{name}.jsonl").exists():
            write_jsonl(path, part)
    return sentences


def _write_policy(study: Study, sentences: Sequence[str], most: int) -> None:
    """Random weights learn all sentences; they, or the model that is given, learn short ones from
    their openings; then it answers.
    """
    from prefloop.evaluation import rank
    from prefloop.generation.commands import sample
    from prefloop.training import sft

    scale, model = study.scale, study.model
    if model is None:
        random_weights = study.root / "random"
        if not random_weights.exists():
            write_small_model(sentences, random_weights, scale.shape, study.seed)
        sft.run(study.sft("base", str(random_weights), "all", scale.pretraining_epochs, lr=2e-3))
        model = str(study.root / "base")
    sft.run(study.sft("sft", model, "answer", scale.sft_epochs, scale.sft_lr))
    wanted = (
        study.sampling("preference", study.samples, 4, 0),
        study.sampling("evaluation", study.many, scale.n, scale.judged_prompts),
    )
    for config in wanted:
        if not config.output.exists():
            sample(config)
    if (there := sum(1 for _ in read_rows(study.samples))) < most:
        raise UserError(f"--sizes {most}: there are only {there} prompts to rank answers to")
    if not (gold := study.root / "many-gold.jsonl").exists():
        rank.run(study.scoring(GOLD, gold))


def _train_reward_model(
    study: Study, folder: Path, labels: int, seed: int, sentences: Sequence[str]
) -> None:
    """From rankings of `labels` prompts by as many annotators as that takes."""
    from prefloop.evaluation import rank
    from prefloop.training import reward

    scale = study.scale
    if not (rankings := folder / "rankings.jsonl").exists():
        rng = np.random.default_rng([study.seed, labels, seed])
        count = max(1, round(labels / scale.prompts_each))
        people = draw_annotators(count, common_words(sentences), scale.taste, rng)
        prompts = rng.permutation(sum(1 for _ in read_rows(study.samples)))[:labels].tolist()
        rank_by_turns(study.samples, rankings, people, scale.flips, prompts, gold_judge, rng)
    reward.run(study.reward(folder, seed))
    if not (scores := folder / "many-proxy.jsonl").exists():
        rank.run(study.scoring(str(folder / "reward"), scores))


def _scores(path: Path) -> Floats:
    """[prompts, answers] of a file that `rank` wrote."""
    return np.array([row["scores"] for _, row in read_rows(path)])


def _prompt_means(judge: Judge, rows: Sequence[Mapping[str, Any]]) -> Floats:
    """[prompts] the mean score of each prompt's answers."""
    scores = [judge([row["prompt"]] * len(row["completions"]), row["completions"]) for row in rows]
    return np.array([sum(each) / len(each) for each in scores])


@dataclass(frozen=True)
class ScoreUnit:
    """A reward model's scores of the SFT model's answers, from which others are told: in their
    deviations from their mean, for each reward model has a scale of its own.
    """

    scores: Floats  # [prompts, answers]

    def of(self, scores: Any) -> Any:
        """Scores in this unit."""
        return (scores - self.scores.mean()) / self.scores.std()


def best_of_n(study: Study, folder: Path) -> list[dict[str, Any]]:
    """A row for n = 1, 2, 4, ...: what the reward model's choice among n answers is worth."""
    from prefloop.evaluation.frontier import best_of_n_kl, best_of_n_weights

    unit = ScoreUnit(_scores(folder / "many-proxy.jsonl"))
    proxy, gold = unit.of(unit.scores), _scores(study.root / "many-gold.jsonl")
    rows = []
    for n in (2**k for k in range(study.scale.n.bit_length())):
        weights = np.array([best_of_n_weights(row.tolist(), n) for row in proxy])
        chosen = {"proxies": (weights * proxy).sum(1), "golds": (weights * gold).sum(1)}
        error = float(chosen["golds"].std(ddof=1) / len(gold) ** 0.5)
        means = {"proxy": float(chosen["proxies"].mean()), "gold": float(chosen["golds"].mean())}
        rows.append(
            {"way": BEST_OF_N, "n": n, "kl": best_of_n_kl(n), **means, "error": error}
            | {name: values.tolist() for name, values in chosen.items()}
        )
    return rows


def _optimise(study: Study, folder: Path, way: str, seed: int) -> list[dict[str, Any]]:
    """Runs PPO; a row an iteration, of the answers that it sampled to learn from."""
    from prefloop.generation.engine import in_process
    from prefloop.training.ppo import run

    config = study.ppo(folder, way, seed)

    def recording(settings: EngineConfig, model: LoadedModel) -> RolloutEngine:
        return Recorder(in_process(settings, model), model, config.output / ANSWERS)

    run(config, recording)
    answers = {row["iteration"]: row["rows"] for _, row in read_rows(config.output / ANSWERS)}
    unit = ScoreUnit(_scores(folder / "many-proxy.jsonl"))
    rows = []
    for _, line in read_rows(config.output / "metrics.jsonl"):
        if "objective/kl" not in line:  # not an iteration's first step
            continue
        asked = answers[(line["step"] - 1) // config.ppo_epochs]
        each = _prompt_means(gold_judge, asked)
        error = float(each.std(ddof=1) / len(each) ** 0.5)
        proxy = float(unit.of(line["objective/scores"]))
        point = asdict(Point(line["objective/kl"], proxy, float(each.mean()), error))
        more = {name: line[name] for name in ("distinct_2", "truncated")}
        more["regression"] = float(_prompt_means(gold_reward, asked).mean())
        rows.append({"way": way, "step": line["step"], **point, **more})
    return rows
