"""Rollouts: what PPO learns from. Sample, score, and turn both into rewards and advantages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prefloop import distributed
from prefloop.config import PPOConfig
from prefloop.data.batches import TokenBatch, packed_length, to_batches
from prefloop.data.tokenize import Example, with_answers
from prefloop.generation.ahead import Ahead
from prefloop.generation.protocol import RolloutEngine, Sample
from prefloop.generation.sampler import Sampling
from prefloop.losses import ppo as losses
from prefloop.losses.kl import k1
from prefloop.models.heads import answer_log_probs, values_with_last
from prefloop.models.model import LoadedModel
from prefloop.models.pieces import split_answers
from prefloop.models.sharding import in_step
from prefloop.models.trunk import trunk_of
from prefloop.records import text_to_json
from prefloop.rewards.health import distinct_n
from prefloop.rewards.scorers import Scorer
from prefloop.training.reference import MovingReference
from prefloop.training.rows import Prompts

LOGGED_SAMPLES = 4  # of each iteration, in samples.jsonl
TENSORS = ("mask", "log_probs", "ref_log_probs", "advantages", "values", "returns")


@dataclass(frozen=True)
class Rollouts:
    """B sampled answers of up to T tokens; `mask` is true on generated tokens."""

    examples: tuple[Example, ...]  # one a prompt, with its sampled answers, B answers in all
    mask: Tensor  # [B, T]
    log_probs: Tensor  # [B, T] log pi_old at the sampling temperature
    ref_log_probs: Tensor | None  # [B, T] of the penalty's reference; None without one
    advantages: Tensor  # [B, T] whitened, times what `importance_cap` weighs them by
    values: Tensor  # [B, T]; zeros without a critic
    returns: Tensor  # [B, T]

    @cached_property
    def state(self) -> list[tuple[Any, ...]]:
        """Each prompt with its tensors."""
        k = len(self.mask) // len(self.examples)
        tensors = [getattr(self, name) for name in TENSORS]
        return [
            (
                (e.prompt, e.answers, e.index, e.where),
                [None if x is None else x[i * k : (i + 1) * k].clone() for x in tensors],
            )
            for i, e in enumerate(self.examples)
        ]

    @classmethod
    def from_state(cls, state: Sequence[tuple[Any, ...]]) -> Rollouts:
        """Of what `state` gave."""
        examples = tuple(
            with_answers(Example(tuple(p), (), (), index=i, where=w), answers)
            for (p, answers, i, w), _ in state
        )
        columns = []
        for parts in zip(*(tensors for _, tensors in state), strict=True):
            rows = [row for part in parts if part is not None for row in part]
            columns.append(pad_sequence(rows, batch_first=True) if rows else None)
        return cls(examples, *columns)  # type: ignore[arg-type]

    def of_all(self, places: Sequence[int]) -> Rollouts:
        """Those of all ranks, in the order of the iteration's rows; `places` are this rank's."""
        own = list(zip(places, self.state, strict=True))
        pieces = dict(piece for part in distributed.gather(own) for piece in part)
        return Rollouts.from_state([pieces[place] for place in sorted(pieces)])


def padded(flat: Tensor, examples: Sequence[Example]) -> Tensor:
    """Values of answer tokens [N], in order, as [B, T] with zeros behind."""
    lengths = [len(answer) for example in examples for answer in example.answers]
    return pad_sequence(list(flat.split(lengths)), batch_first=True)


@dataclass
class RunningScores:
    """Moments of all scores so far, over all ranks."""

    sum: float = 0.0
    sum_of_squares: float = 0.0
    count: float = 0.0

    def add(self, scores: Tensor, device: torch.device) -> None:
        """Counts in the scores [B] of all ranks."""
        own = losses.moments(scores, torch.ones_like(scores, dtype=torch.bool))
        parts = {name: float(value) for name, value in own._asdict().items()}
        total = distributed.sum_mapping(parts, device)
        self.sum += total["sum"]
        self.sum_of_squares += total["sum_of_squares"]
        self.count += total["count"]

    def scaled(self, scores: Tensor) -> Tensor:
        """(s - mean) / deviation."""
        mean = self.sum / self.count
        variance = max(self.sum_of_squares / self.count - mean**2, 0.0)
        return (scores - mean) / math.sqrt(variance + 1e-8)


BASELINES = {
    "rloo": losses.rloo_advantages,
    "grpo": losses.grpo_advantages,
    "dr-grpo": losses.dr_grpo_advantages,
}


def advantages_and_returns(
    config: PPOConfig,
    scores: Tensor,
    log_probs: Tensor,
    ref_log_probs: Tensor,
    values: Tensor,
    mask: Tensor,
    kl_coef: float,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages [B, T], whitened over all ranks' tokens, and the critic's targets [B, T].

    `after`: see losses.gae; read with `bootstrap_cut`.
    """
    if config.advantage == "gae":
        rewards = losses.token_rewards(scores, log_probs, ref_log_probs, mask, kl_coef)
        if config.whiten_rewards:
            rewards = _whiten(rewards, mask, shift_mean=False)
        factors = {"gamma": config.gamma, "lam": config.gae_lambda}
        after = after if config.bootstrap_cut else None
        advantages = losses.gae(rewards, values, mask, **factors, after=after)
        return _whiten(advantages, mask), (advantages + values) * mask
    kl = ((log_probs - ref_log_probs) * mask).sum(1)
    groups = (scores - kl_coef * kl).view(-1, config.samples_per_prompt)
    per_answer = BASELINES[config.advantage](groups).flatten()
    return per_answer[:, None] * mask, torch.zeros_like(values)


def _whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    whole = global_moments(x, mask)
    return losses.whiten(x, mask, whole.mean, whole.variance, shift_mean)


def global_moments(x: Tensor, mask: Tensor) -> losses.Moments:
    """Moments over the tokens of all ranks."""
    parts = losses.moments(x, mask)
    sums = torch.stack([parts.sum, parts.sum_of_squares, parts.count.double()])
    total = distributed.sum_tensor(sums)
    return losses.Moments(total[0], total[1], total[2].long())


class _Passes(NamedTuple):
    """What the models say of B sampled answers of up to T tokens."""

    log_probs: Tensor  # [B, T]
    ref_log_probs: Tensor | None  # [B, T]; None without a reference
    moved_log_probs: Tensor | None  # [B, T] of the reference that moves, where there is one
    values: Tensor  # [B, T]; zeros without a critic
    after: Tensor  # [B] the critic's value after the last token


class Asked(NamedTuple):
    """What an iteration samples answers to, on all ranks."""

    prompts: Prompts
    seed: int


@dataclass(frozen=True)
class Sampler:
    """The models and settings that make rollouts."""

    config: PPOConfig
    policy: LoadedModel
    critic: LoadedModel | None
    reference: LoadedModel | None  # None: the policy without its adapters, if it has any
    scorer: Scorer
    stop_token_ids: frozenset[int]
    engine: RolloutEngine
    moving: MovingReference | None = None  # what KL is penalised to, where not to the reference

    @torch.no_grad()
    def roll_out(
        self,
        asked_for: Asked,
        kl_coef: float,
        running: RunningScores,
        version: int,
        following: Asked | None = None,
    ) -> tuple[Rollouts, list[int], dict[str, float], list[dict[str, Any]]]:
        """Samples, scores and weighs; returns this rank's answers and their places among all
        ranks', metrics of all, readable samples.

        `version` numbers the policy's weights, which go on to sample answers to `following`.
        """
        config, device, encoder = self.config, self.policy.device, self.policy.encoder
        # 1. Sample from the newest weights, or take what those before have sampled.
        groups = self._sample(asked_for, version, following)
        answered = [
            with_answers(example, [sample.tokens for sample in group])
            for example, group in zip(asked_for.prompts.examples, groups, strict=True)
        ]
        places = distributed.my_places(map(packed_length, answered))  # lengths are known now
        examples = [answered[place] for place in places]
        # 2. Log-probs of policy and reference, and values, as the trainer computes them.
        log_probs, start, moved, values, after = self._forward_passes(examples)
        lengths = torch.tensor([len(answer) for e in examples for answer in e.answers])
        mask = torch.arange(log_probs.shape[1]) < lengths[:, None]
        # 3. Scores.
        flat = [sample for place in places for sample in groups[place]]
        asked = [asked_for.prompts.records[place] for place in places for _ in groups[place]]
        texts = [encoder.said(r.prompt, s.tokens) for r, s in zip(asked, flat, strict=True)]
        stopped = torch.tensor([sample.finish_reason == "stop" for sample in flat])
        scored = self.scorer(asked, texts, examples)
        raw = torch.tensor(scored.scores, dtype=torch.float32)
        scores = self._adjusted(raw, stopped, running)
        # 4. Advantages and returns.
        ref_log_probs = start if moved is None else moved
        ref = log_probs if ref_log_probs is None else ref_log_probs  # then kl_coef is 0
        after = torch.where(stopped, 0.0, after)  # an answer that was cut did not end there
        advantages, returns = advantages_and_returns(
            config, scores, log_probs, ref, values, mask, kl_coef, after
        )
        rollouts = Rollouts(
            tuple(examples), mask, log_probs, ref_log_probs, advantages, values, returns
        )
        sampled = padded(torch.tensor([p for s in flat for p in s.log_probs]), examples)
        gap = (sampled - log_probs).abs()
        metrics = rollout_metrics(rollouts, start, scores, stopped, gap, kl_coef, device)
        if config.importance_cap:
            rollouts, weighed = importance_weighed(rollouts, sampled, config.importance_cap)
            metrics |= weighed
        metrics |= score_means(scored.parts, len(flat), device)
        metrics |= distributed.sum_mapping(scored.cost, device)
        samples = [
            {"prompt": text_to_json(asked[i].prompt), "completion": texts[i]}
            | {"score": float(raw[i]), "weights_version": flat[i].weights_version}
            for i in range(0, len(flat), max(1, len(flat) // LOGGED_SAMPLES))
        ][:LOGGED_SAMPLES]
        return rollouts, places, metrics, samples

    def _sample(self, asked: Asked, version: int, following: Asked | None) -> list[list[Sample]]:
        """Each prompt's answers, of all ranks, by the policy as it is now or, with
        `rollout_ahead`, as it was an iteration ago.
        """
        engine = self.engine
        groups = engine.take(version) if isinstance(engine, Ahead) else None
        if groups is None or following:
            engine.sync(self.policy, version)
        if groups is None:
            groups = self._ask(asked, engine)
        if following:
            assert isinstance(engine, Ahead)
            engine.start(version + 1, partial(self._ask, following))
        oldest = version - self.config.rollout_ahead
        versions = {sample.weights_version for group in groups for sample in group}
        assert all(oldest <= each <= version for each in versions), (version, versions)
        return distributed.interleaved(groups)

    def _ask(self, asked: Asked, engine: RolloutEngine) -> list[list[Sample]]:
        """Answers to this rank's prompts: every so many-th, for nobody knows their lengths yet."""
        sampling = Sampling(
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            stop_token_ids=self.stop_token_ids,
        )
        examples = asked.prompts.examples
        places = distributed.dealt(range(len(examples)))
        ids = [examples[place].prompt for place in places]
        count = self.config.samples_per_prompt
        return engine.generate(ids, count, sampling, asked.seed, numbers=places)

    def _forward_passes(self, examples: Sequence[Example]) -> _Passes:
        config, device = self.config, self.policy.device
        new: list[Tensor] = []
        old: list[Tensor] = []
        values: list[tuple[Tensor, Tensor]] = []
        models = [model for model in (self.policy, self.reference, self.critic) if model]
        most, wide = config.micro_batch_tokens, not all(model.packed for model in models)

        def batches() -> Iterable[TokenBatch]:
            return to_batches(split_answers(examples, most, wide), most, device, wide)

        with in_step(models):
            for batch in batches():
                trunk = trunk_of(self.policy)
                new.append(answer_log_probs(self.policy, batch, config.temperature, trunk))
                if self.reference:
                    old.append(answer_log_probs(self.reference, batch, config.temperature, trunk))
                if self.critic:
                    values.append(values_with_last(self.critic, batch, trunk))
        moved: list[Tensor] = []
        if self.moving:
            with self.moving.in_place(), in_step([self.policy]):
                moved += [answer_log_probs(self.policy, b, config.temperature) for b in batches()]
        log_probs = padded(torch.cat(new).cpu(), examples)
        start, follows = (padded(torch.cat(x).cpu(), examples) if x else None for x in (old, moved))
        if not self.critic:
            nothing = torch.zeros_like(log_probs)
            return _Passes(log_probs, start, follows, nothing, nothing[:, 0])
        each, after = (torch.cat(part).cpu() for part in zip(*values, strict=True))
        return _Passes(log_probs, start, follows, padded(each, examples), after)

    def _adjusted(self, scores: Tensor, stopped: Tensor, running: RunningScores) -> Tensor:
        if self.config.normalize_scores:
            running.add(scores, self.policy.device)
            scores = running.scaled(scores)
        if self.config.reward_clip:
            scores = scores.clamp(-self.config.reward_clip, self.config.reward_clip)
        if self.config.missing_eos_penalty is not None:
            scores = torch.where(stopped, scores, self.config.missing_eos_penalty)
        return scores


def importance_weighed(
    rollouts: Rollouts, sampled: Tensor, cap: float
) -> tuple[Rollouts, dict[str, float]]:
    """With advantages times min(pi_old / mu, cap); `sampled` [B, T] is log mu, the sampler's."""
    weights = losses.importance_weights(rollouts.log_probs, sampled, cap)
    named = {"val/importance": weights, "val/importance_capped": (weights >= cap).float()}
    means = {name: float(global_moments(x, rollouts.mask).mean) for name, x in named.items()}
    return replace(rollouts, advantages=rollouts.advantages * weights), means


def score_means(
    parts: Mapping[str, list[float]], count: int, device: torch.device
) -> dict[str, float]:
    """Each reward function's mean score over all ranks' answers, unweighted."""
    sums = {f"objective/scores/{name}": sum(scores) for name, scores in parts.items()}
    total = distributed.sum_mapping(sums | {"count": float(count)}, device)
    answers = total.pop("count")
    return {name: value / answers for name, value in total.items()}


def rollout_metrics(
    rollouts: Rollouts,
    start: Tensor | None,
    scores: Tensor,
    stopped: Tensor,
    sampler_gap: Tensor,
    kl_coef: float,
    device: torch.device,
) -> dict[str, float]:
    """Over all ranks' answers, named as TRL 1.12's PPO names them.

    val/sampler_gap is the mean |log pi| difference of a token between sampler and trainer, nats.
    objective/kl is to the reference that stays, of log-probs `start` [B, T]; without it there is no
    KL to tell of. Where another is penalised, that one's is objective/kl_moving.
    """
    mask = rollouts.mask
    lengths = mask.sum(1).float()
    answers = [answer for example in rollouts.examples for answer in example.answers]
    everyone = [a for part in distributed.gather(answers) for a in part]
    wide = torch.float64  # all is on the CPU, and sums do not depend on which rank holds what
    sums = {
        "objective/entropy": -(rollouts.log_probs * mask).sum(dtype=wide),
        "objective/scores": scores.sum(dtype=wide),
        "length_mean": lengths.sum(),
        "truncated": (~stopped).sum(),
        "tokens": lengths.sum(),
        "gap": sampler_gap.mul(mask).sum(dtype=wide),
    }
    if start is not None and rollouts.ref_log_probs is not None:
        far, kl = (
            k1(rollouts.log_probs - log_probs).mul(mask).sum(dtype=wide)
            for log_probs in (start, rollouts.ref_log_probs)
        )
        sums["objective/kl"] = far
        if rollouts.ref_log_probs is not start:
            sums["objective/kl_moving"] = kl
        sums["objective/non_score_reward"] = -kl_coef * kl
        sums["objective/rlhf_reward"] = sums["objective/scores"] - kl_coef * kl
    totals = distributed.sum_mapping({k: float(v) for k, v in sums.items()}, device)
    tokens, gap = totals.pop("tokens"), totals.pop("gap")
    metrics = {name: total / len(everyone) for name, total in totals.items()}
    all_lengths = torch.tensor([len(answer) for answer in everyone], dtype=torch.float32)
    metrics |= {
        "length_p95": float(all_lengths.quantile(0.95)),
        "distinct_2": distinct_n(everyone, 2),
        "val/sampler_gap": gap / tokens,
        "val/num_eos_tokens": len(everyone) - totals["truncated"],
    }
    spread = global_moments(rollouts.returns, mask).variance
    if spread > 0:
        error = global_moments(rollouts.returns - rollouts.values, mask).variance
        metrics["val/explained_variance"] = float(1 - error / spread)
    return metrics
