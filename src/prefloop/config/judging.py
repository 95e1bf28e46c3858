"""Settings of the commands that judge answers: rankings, win rates, comparisons. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from prefloop.config.endpoint import EndpointConfig, JudgeMode
from prefloop.config.inference import InferenceConfig, PromptsConfig
from prefloop.config.ranges import (
    ANY,
    Above,
    AtLeast,
    OnlyWith,
    Seed,
    Settings,
    Within,
    is_endpoint,
    no_room,
    unread_by_functions,
)
from prefloop.config.training import BadRows, Truncation


@dataclass(frozen=True, kw_only=True)
class RankConfig(EndpointConfig, InferenceConfig):
    """Rank sampled answers by a judge, as people would: no labels, no labellers."""

    data: str
    """Rows with a `prompt` and `completions`, as `sample` writes them."""
    judge: str
    """`module:function(prompts, completions) -> list[float]`, a reward model's folder or hub id, or
    an LLM, openai:MODEL@URL."""
    judge_mode: JudgeMode = "pairwise"
    """LLM judge: compare each two answers in both orders, or score each answer by a rubric."""
    output: Path
    """JSONL of rankings, or of demonstrations with --form best."""
    form: Literal["rankings", "best"] = "rankings"
    """rankings: all answers of each prompt in their order, equal scores tied; best: each prompt's
    best answer alone, as sft takes it (of equal ones the first)."""
    min_score: Annotated[float | None, ANY, OnlyWith("form", "best")] = None
    """Leave a prompt out (counted) whose best answer scores less."""
    bad_rows: BadRows = "error"
    """What to do with rows that cannot be ranked: stop at the first, or drop and count them."""
    chat: bool = False
    """Take string rows for the user's and the assistant's messages."""
    micro_batch_tokens: Annotated[int, Above(0)] = 8192
    """Most tokens in one forward pass of a judge that is a model."""

    def problems(self) -> Iterator[str]:
        """See Settings."""
        yield from super().problems()
        yield from unread_by_functions(self, "--judge", (self.judge,))
        if self.min_score is not None and is_endpoint(self.judge) and self.judge_mode == "pairwise":
            yield "--min-score: a pairwise judge gives no scores; give --judge-mode rubric"
        if not self.output.name.endswith((".jsonl", ".jsonl.gz")):
            yield f"--output {self.output}: give the name of a .jsonl or .jsonl.gz file"


@dataclass(frozen=True, kw_only=True)
class JudgeQualityConfig(EndpointConfig, InferenceConfig):
    """How far a judge agrees with people, beside how far people agree with each other."""

    data: str
    """Answers with the rankings of several people: rows of `prompt`, `completions` and `raters` or
    `judged`, or a row a person; or DB#PROJECT."""
    judge: str
    """`module:function(prompts, completions) -> list[float]`, a reward model's folder or hub id, or
    an LLM, openai:MODEL@URL."""
    judge_mode: JudgeMode = "pairwise"
    """LLM judge: compare each two answers in both orders, or score each answer by a rubric."""
    max_rows: Annotated[int, AtLeast(0)] = 0
    """Use only the first n sets of answers; 0 uses all."""
    bad_rows: BadRows = "error"
    """What to do with rows that say of no order: stop at the first, or drop and count them."""
    chat: bool = False
    """Take string rows for the user's and the assistant's messages."""
    output: Path | None = None
    """JSON file of the numbers; they are printed in any case."""
    micro_batch_tokens: Annotated[int, Above(0)] = 8192
    """Most tokens in one forward pass of a judge that is a model."""
    seed: Seed = 0
    """Seed of the bootstrap over prompts."""

    def problems(self) -> Iterator[str]:
        """See Settings."""
        yield from super().problems()
        yield from unread_by_functions(self, "--judge", (self.judge,))


@dataclass(frozen=True, kw_only=True)
class CompareConfig(EndpointConfig, PromptsConfig, InferenceConfig):
    """Compare models with the SFT model on the same prompts: one HTML page and a table."""

    sft: str
    """The SFT model: a run directory, a Hugging Face folder or a hub id."""
    models: tuple[str, ...]
    """`name=path` of each model to compare: run directories, folders or hub ids. One name with
    several paths is one way, trained with several seeds."""
    data: str
    """Held-out rows with a `prompt`, or DB#PROJECT."""
    judge: str
    """Gold score: `module:function(prompts, completions) -> list[float]`, a reward model's folder
    or hub id, or an LLM, openai:MODEL@URL."""
    judge_mode: JudgeMode = "rubric"
    """LLM judge: score each answer by a rubric, or compare it with SFT's answers to the same prompt
    in both orders; its score is then the share of them that it wins."""
    output: Path
    """Directory of report.html, compare.json and answers.jsonl."""
    reward_model: str | None = None
    """The reward model that PPO was trained against; adds its scores and best-of-n."""
    best_of: Annotated[int, Above(0), OnlyWith("reward_model")] = 4
    """n of best-of-n: answers of the SFT model among which --reward-model chooses; 1 leaves it."""
    agreement: Annotated[float | None, Within(0.5, 1), OnlyWith("reward_model")] = None
    """How often two labellers order a pair alike (0.5 to 1): adds the ceiling of the reward model's
    held-out accuracy."""
    samples_per_prompt: Annotated[int, Above(0)] = 1
    """Answers per prompt and model."""
    max_new_tokens: Annotated[int, Above(0)] = 128
    """Most tokens of an answer."""
    temperature: Annotated[float, AtLeast(0)] = 1.0
    """Sampling temperature."""
    seed: Seed = 0
    """Seed of sampling and of the bootstrap."""

    def problems(self) -> Iterator[str]:
        """See Settings."""
        yield from super().problems()
        yield from no_room(self.max_new_tokens, self.max_length)
        if not self.models:
            yield "--models is empty; give name=path of each model to compare"
        for model in self.models:
            if not all(model.partition("=")):
                yield f"--models holds {model!r}; give name=path"
        names = [model.partition("=")[0] for model in self.models]
        for model in sorted({m for m in self.models if self.models.count(m) > 1}):
            yield f"--models holds {model!r} twice; a name's other runs have other paths"
        for taken in sorted({n for n in names if re.fullmatch("(?i:sft)|best-of-(n|[0-9]+)", n)}):
            yield f"--models uses the name {taken!r}; choose another"


@dataclass(frozen=True, kw_only=True)
class RejudgeConfig(EndpointConfig):
    """Judge the answers of a comparison by another judge; no model writes new ones."""

    comparison: Path
    """The folder that `prefloop compare` wrote; all but the judge is as it was there."""
    judge: str
    """Gold score: `module:function(prompts, completions) -> list[float]`, a reward model's folder
    or hub id, or an LLM, openai:MODEL@URL."""
    judge_mode: JudgeMode = "rubric"
    """LLM judge: score each answer by a rubric, or compare it with SFT's answers to the same prompt
    in both orders; its score is then the share of them that it wins."""
    output: Path
    """Directory of report.html, compare.json and answers.jsonl; another than --comparison."""

    def problems(self) -> Iterator[str]:
        """See Settings."""
        yield from super().problems()
        if self.output.resolve() == self.comparison.resolve():
            yield "--output is --comparison; give another folder, so that both can be read"


@dataclass(frozen=True, kw_only=True)
class WinrateConfig(EndpointConfig, InferenceConfig):
    """Win rate of one file of answers against another, with a 95 % interval."""

    answers: Path
    """JSONL of {prompt, completion} or {prompt, completions}."""
    baseline: Path
    """The other side's answers to the same prompts, in the same form."""
    judge: str
    """`module:function(prompts, completions) -> list[float]`, a reward model's folder or hub id, or
    an LLM, openai:MODEL@URL."""
    judge_mode: JudgeMode = "pairwise"
    """LLM judge: compare each two answers in both orders, or score each answer by a rubric."""
    chat: bool = False
    """Take string prompts for the user's messages."""
    output: Path | None = None
    """JSON file of the numbers; they are printed in any case."""
    micro_batch_tokens: Annotated[int, Above(0)] = 8192
    """Most tokens in one forward pass of a judge that is a model."""
    seed: Seed = 0
    """Seed of the scores' bootstrap over prompts."""

    def problems(self) -> Iterator[str]:
        """See Settings."""
        yield from super().problems()
        yield from unread_by_functions(self, "--judge", (self.judge,))
        if self.seed and is_endpoint(self.judge) and self.judge_mode == "pairwise":
            yield "--seed: a pairwise judge gives no scores, whose bootstrap it is of; leave it out"


@dataclass(frozen=True, kw_only=True)
class PeopleConfig(Settings):
    """Did people prefer it? What they said of a comparison's answers, beside its judge."""

    labels: str
    """Where people judged the answers: a labelling store, DB or DB#PROJECT."""
    data: str
    """The folder that `prefloop compare` wrote and `label import` took; its page and compare.json
    get the verdict, and people.json is written there."""
    exclude: tuple[str, ...] = ()
    """Labellers whose judgements are left out."""


@dataclass(frozen=True, kw_only=True)
class RewardQualityConfig(InferenceConfig):
    """How far a reward model can be trusted, on preferences it was not trained on."""

    reward_model: str
    """Sequence-classification folder, run directory or hub id with one label."""
    data: str
    """Held-out rankings or pairs."""
    chat: bool = False
    """Take string rows for the user's and the assistant's messages."""
    agreement: Annotated[float | None, Within(0.5, 1)] = None
    """How often two labellers order a pair alike (0.5 to 1): adds the ceiling of the accuracy."""
    output: Path | None = None
    """JSON file of the numbers; they are printed in any case."""
    truncation: Truncation = "error"
    """What to do with longer rows."""
    micro_batch_tokens: Annotated[int, Above(0)] = 8192
    """Most tokens in one forward pass."""
