"""The policy's answers to held-out prompts, scored by something that it does not learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from prefloop import distributed
from prefloop.config import PPOConfig
from prefloop.config.monitoring import SPREAD, training_reward
from prefloop.config.ranges import is_endpoint, is_function, template_arguments
from prefloop.data.tokenize import Example, stop_token_ids, with_answers
from prefloop.errors import UserError
from prefloop.generation.protocol import MakeEngine, RolloutEngine
from prefloop.generation.sampler import Sampling
from prefloop.intervals import mean_score
from prefloop.models.heads import sequence_log_probs
from prefloop.models.load import load_reward_model
from prefloop.models.model import LoadedModel
from prefloop.models.weights import storage_of
from prefloop.provenance import files_digest
from prefloop.records import Prompt
from prefloop.rewards.functions import columns_of, function_judge
from prefloop.rewards.health import copied_share, distinct_n, repeated_share
from prefloop.rewards.judges import Judge
from prefloop.rewards.llm import RubricJudge, rubric_judge
from prefloop.rewards.scorers import ModelJudge, model_scorer, together, with_template_args
from prefloop.runs import Run, model_path
from prefloop.training import checkpoint
from prefloop.training.reference import as_it_is
from prefloop.training.rows import Monitored, Prompts, read_monitored

MOST_FAILED = 0.1
"""Of the answers: a policy must not gain by answers that an LLM cannot score."""


class Scores(NamedTuple):
    """What the monitor says of some answers."""

    scores: Sequence[float | None]  # one an answer; None where an LLM gave none
    spreads: Sequence[float] = ()  # between several reward models, where they are the monitor
    why: str = ""  # the first answer without a score, or what kept all from having one


Score = Callable[[Sequence[Prompt], Sequence[str], Sequence[Example], Sequence[bool]], Scores]
"""From prompts, their answers' texts and tokens, and whether each answer ended."""


class Answer(NamedTuple):
    """A prompt's answer, measured."""

    place: int  # of the prompt among all ranks'
    tokens: tuple[int, ...]
    ended: bool
    log_ratio: float  # log pi(y|x) - log pi_start(y|x), nats
    score: float | None
    spread: float


class Measurement(NamedTuple):
    """The policy at one step, over all ranks' prompts."""

    metrics: dict[str, float]  # by what stands behind `monitor/`; no score where it is missed
    scores: list[float | None]  # one a prompt
    missed: str  # why there is no score


@dataclass(frozen=True)
class Monitor:
    """Samples, scores and measures, and leaves the run's generators as it found them."""

    config: Monitored
    policy: LoadedModel
    start: LoadedModel  # what KL is measured from
    prompts: Prompts
    score: Score
    engine: RolloutEngine

    def measure(self) -> Measurement:
        """The policy as it is now; on the same prompts with the same random numbers each time."""
        before = checkpoint.rng_state()
        places = range(distributed.rank(), len(self.prompts.examples), distributed.world())
        own = self._answers(list(places)) if places else ([], "")
        checkpoint.set_rng_state(before)
        parts = distributed.gather(own)
        answers = sorted(answer for part, _ in parts for answer in part)
        return self._measurement(answers, next((why for _, why in parts if why), ""))

    @torch.no_grad()
    def _answers(self, places: Sequence[int]) -> tuple[list[Answer], str]:
        """This rank's, and why some have no score."""
        config, policy = self.config, self.policy
        prompts = self.prompts.take(places)
        self.engine.sync(policy, version=-1)
        sampling = Sampling(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            stop_token_ids=stop_token_ids(policy.tokenizer, policy.hf.generation_config),
        )
        ids = [example.prompt for example in prompts.examples]
        groups = self.engine.generate(ids, 1, sampling, config.seed, numbers=places)
        samples = [sample for (sample,) in groups]
        pairs = zip(prompts.records, samples, strict=True)
        texts = [policy.encoder.said(row.prompt, sample.tokens) for row, sample in pairs]
        pairs_of_ids = zip(prompts.examples, samples, strict=True)
        examples = [with_answers(example, [sample.tokens]) for example, sample in pairs_of_ids]
        ended = [sample.finish_reason == "stop" for sample in samples]
        said = self.score(prompts.records, texts, examples, ended)
        most, temperature = config.micro_batch_tokens, config.temperature or 1.0
        new, old = (
            sequence_log_probs(m, examples, most, temperature) for m in (policy, self.start)
        )
        tokens = [sample.tokens for sample in samples]
        spreads = said.spreads or [0.0] * len(samples)
        columns = (places, tokens, ended, (new - old).tolist(), said.scores, spreads)
        return [Answer(*row) for row in zip(*columns, strict=True)], said.why

    def _measurement(self, answers: Sequence[Answer], why: str) -> Measurement:
        scores, count = [answer.score for answer in answers], len(answers)
        known = [score for score in scores if score is not None]
        failed = count - len(known)
        metrics = {
            "kl": sum(answer.log_ratio for answer in answers) / count,
            "length": sum(len(answer.tokens) for answer in answers) / count,
            "truncated": sum(not answer.ended for answer in answers) / count,
            "distinct_2": distinct_n([answer.tokens for answer in answers]),
            "repeated": sum(repeated_share(answer.tokens) for answer in answers) / count,
            "copied": sum(map(self._copied, answers)) / count,
        }
        if self.config.monitor == SPREAD:
            metrics["spread"] = sum(answer.spread for answer in answers) / count
        if failed:
            metrics["failed"] = failed
        if failed > MOST_FAILED * count:
            return Measurement(
                metrics, scores, f"{failed} of {count} answers without a score: {why}"
            )
        interval = mean_score([[score] for score in known], self.config.seed)
        bounds = {"score": interval.mean, "low": interval.low, "high": interval.high}
        return Measurement(bounds | metrics, scores, "")

    def _copied(self, answer: Answer) -> float:
        return copied_share(answer.tokens, self.prompts.examples[answer.place].prompt)


def load_monitor(
    config: Monitored,
    policy: LoadedModel,
    run: Run,
    make_engine: MakeEngine,
    reference: LoadedModel | None = None,
    rewards: Sequence[LoadedModel] = (),
) -> Monitor | None:
    """The monitor that the settings name; None where they name none.

    KL is measured from `reference`, or else from the policy as it is now. `rewards` are the reward
    models that it learns from: they are the monitor by their spread alone.
    """
    if config.monitor is None:
        return None
    judge = None if config.monitor == SPREAD else _judge(config, config.monitor, policy, rewards)

    def require(rows: Iterable[Prompt]) -> None:
        if judge:
            judge.require(rows)

    prompts = read_monitored(config, policy, run, require)
    if len(prompts.examples) < 2:
        raise UserError(
            f"--monitor-data {config.monitor_data}: one prompt says nothing of how sure a score "
            "is; give more"
        )
    if len(prompts.examples) < distributed.world():
        raise UserError(
            f"--monitor-data {config.monitor_data}: {len(prompts.examples)} prompts for "
            f"{distributed.world()} processes; give at least one each"
        )
    score = _by_judge(judge) if judge else _by_spread(config, policy, prompts, rewards)
    start = reference or as_it_is(config, policy)
    return Monitor(config, policy, start, prompts, score, make_engine(config, policy))


def _judge(
    config: Monitored, source: str, policy: LoadedModel, rewards: Sequence[LoadedModel]
) -> Judge:
    if is_function(source):
        return function_judge(source)
    if is_endpoint(source):
        return rubric_judge(source, config)
    paths = [Path(model_path(path)) for path in (source, *(model.source for model in rewards))]
    digests = [files_digest(path) if path.is_dir() else "" for path in paths]
    if digests[0] and digests[0] in digests[1:]:  # a copy of it, or its run directory
        raise UserError(training_reward(source))
    model = load_reward_model(source, policy.device, storage_of(config))
    model.module.requires_grad_(False)
    model = with_template_args(model, template_arguments(config.template_args))
    return ModelJudge(model, config.micro_batch_tokens)


def _by_judge(judge: Judge) -> Score:
    """An LLM that stays away, or cannot score an answer, ends nothing here."""

    def score(
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        examples: Sequence[Example],
        ended: Sequence[bool],
    ) -> Scores:
        asked = [row.prompt for row in prompts]
        if not isinstance(judge, RubricJudge):
            columns = columns_of([row.extra for row in prompts])
            return Scores(judge(asked, completions, ended, columns))
        try:
            return Scores(judge.rate(asked, completions, ended), why=judge.endpoint.why)
        except UserError as error:
            return Scores([None] * len(completions), why=str(error))

    return score


def _by_spread(
    config: Monitored, policy: LoadedModel, prompts: Prompts, rewards: Sequence[LoadedModel]
) -> Score:
    """Mean of the run's reward models less their standard deviation (see scorers.together)."""
    assert isinstance(config, PPOConfig)
    single = replace(config, samples_per_prompt=1)
    stops = stop_token_ids(policy.tokenizer, policy.hf.generation_config)
    each = [model_scorer(model, policy, prompts.records, single, stops) for model in rewards]
    scorer = together(config.reward_models, each, "lower-bound")

    def score(
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        examples: Sequence[Example],
        ended: Sequence[bool],
    ) -> Scores:
        scored = scorer(prompts, completions, examples)
        return Scores(scored.scores, scored.parts["spread"])

    return score
