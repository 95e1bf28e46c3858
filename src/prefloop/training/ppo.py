"""PPO (arXiv 1707.06347) with the details of "The N+ implementation details" (arXiv 2403.17031).

An iteration samples answers with the newest weights, scores them, and takes
`ppo_epochs` x `num_minibatches` optimiser steps on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefloop import distributed
from prefloop.config import PPOConfig
from prefloop.data import stream
from prefloop.data.batches import TokenBatch, micro_batches, pack, packed_length
from prefloop.data.tokenize import Example, stop_token_ids
from prefloop.errors import UserError
from prefloop.generation.ahead import Ahead, Begun
from prefloop.generation.protocol import MakeEngine
from prefloop.generation.remote import engine_for
from prefloop.losses import ppo as losses
from prefloop.losses.sft import sft_loss
from prefloop.models.export import export_model
from prefloop.models.heads import answer_log_probs, token_values
from prefloop.models.load import load_policy
from prefloop.models.model import LoadedModel
from prefloop.models.pieces import split_answers
from prefloop.models.trunk import trunk_of
from prefloop.rewards.functions import function_judge
from prefloop.rewards.llm import rubric_judge
from prefloop.rewards.scorers import model_scorer, text_scorer, together
from prefloop.runs import Run
from prefloop.training import checkpoint, loop, planning
from prefloop.training.full_rows import SMALLEST, example
from prefloop.training.method import LossSums, Step
from prefloop.training.monitor import load_monitor
from prefloop.training.reference import MovingReference, penalised_from
from prefloop.training.rehearsal import Work
from prefloop.training.roles import load_beside
from prefloop.training.rollout import Asked, Rollouts, RunningScores, Sampler
from prefloop.training.rows import Prompts, order_of, own_batches, read_for_ppo
from prefloop.training.start import divide, model_options, start

CRITIC_WARMUP = 4
"""Of a run of 32 iterations or more (docs/benchmarks.md, "What makes PPO's critic learn")."""


class RolloutBatch(NamedTuple):
    """Sampled answers with what the clipped losses need of their N tokens."""

    batch: TokenBatch
    log_probs: Tensor  # [N] log pi_old
    advantages: Tensor  # [N]
    values: Tensor  # [N]; zeros without a critic
    returns: Tensor  # [N]

    def to(self, device: torch.device | str) -> RolloutBatch:
        """See Movable."""
        return RolloutBatch(self.batch.to(device), *(part.to(device) for part in self[1:]))


class PPO:
    """The method: `steps()` samples, so the one loop serves it."""

    def __init__(
        self,
        config: PPOConfig,
        sampler: Sampler,
        prompts: Prompts,
        ptx_examples: list[Example],
        eval_prompts: Prompts,
        fixed: Sequence[LoadedModel],
    ) -> None:
        """`fixed`: all models whose weights, where frozen, must be the same when resumed."""
        self.config, self.sampler, self.prompts = config, sampler, prompts
        self.policy, self.critic = sampler.policy, sampler.critic
        self.ptx_examples, self.eval_prompts, self.fixed = ptx_examples, eval_prompts, fixed
        self.kl_coef = config.kl_coef
        self.rollouts: Rollouts | None = None  # of the iteration under way
        self.stopped_early = False  # the iteration under way, by target_kl
        self.critic_alone = False  # learns in the iteration under way
        self.ends_iteration = False  # the step under way
        self.running = RunningScores()

    @property
    def trained(self) -> Mapping[str, LoadedModel]:
        """See Method."""
        return {"policy": self.policy} | ({"value": self.critic} if self.critic else {})

    @property
    def learning_rates(self) -> Mapping[str, float]:
        """The critic's own, where set."""
        return {"value": self.config.value_lr} if self.config.value_lr else {}

    @property
    def _size(self) -> int:
        most = self.config.batch_size * self.config.num_minibatches
        return min(most, len(self.prompts.examples))

    @property
    def steps_per_iteration(self) -> int:
        """Optimiser steps on one iteration's answers."""
        return self.config.ppo_epochs * self.config.num_minibatches

    @property
    def critic_warmup(self) -> int:
        """First iterations in which the critic learns alone; 0 without one."""
        if self.config.critic_warmup is None and self.critic:
            return min(CRITIC_WARMUP, self.total_steps // self.steps_per_iteration // 8)
        return self.config.critic_warmup or 0

    @property
    def total_steps(self) -> int:
        """Optimiser steps: iterations x passes x minibatches, or `max_steps`."""
        count, config = len(self.prompts.examples), self.config
        most = config.batch_size * config.num_minibatches
        iterations = stream.total_steps(count, most, config.epochs, 0)
        return config.max_steps or iterations * self.steps_per_iteration

    def steps(self, start_step: int) -> Iterator[Step[RolloutBatch | TokenBatch]]:
        """See Method: sampled answers, and PPO-ptx rows as plain batches.

        A resumed iteration goes on with the rollouts it had.
        """
        first, within = divmod(start_step, self.steps_per_iteration)
        iterations = math.ceil(self.total_steps / self.steps_per_iteration)
        for iteration in range(first, iterations):
            self.critic_alone = iteration < self.critic_warmup
            metrics: dict[str, float] = {}
            samples: list[dict[str, Any]] = []
            if iteration > first or within == 0:
                self.stopped_early = False
                self.rollouts, metrics, samples = self._roll_out(iteration, iterations)
            for number in range(within, self.steps_per_iteration):
                self.ends_iteration = number + 1 == self.steps_per_iteration
                batches = [] if self.stopped_early else self._minibatch(iteration, number)
                yield Step(batches, sum(map(self._tokens, batches)), metrics, samples)
                metrics, samples = {}, []
            within = 0

    def _roll_out(
        self, iteration: int, iterations: int
    ) -> tuple[Rollouts, dict[str, float], list[dict[str, Any]]]:
        ahead = self.config.rollout_ahead and iteration + 1 < iterations
        following = self._asked(iteration + 1, iterations) if ahead else None
        own, places, metrics, samples = self.sampler.roll_out(
            self._asked(iteration, iterations), self.kl_coef, self.running, iteration, following
        )
        metrics["kl_coef"] = self.kl_coef
        if self.config.kl_target:
            self.kl_coef = losses.next_kl_coef(
                self.kl_coef,
                metrics["objective/kl"],
                target=self.config.kl_target,
                episodes=self._size * self.config.samples_per_prompt,
                horizon=self.config.kl_horizon,
            )
        return own.of_all(places), metrics, samples

    def _asked(self, iteration: int, iterations: int) -> Asked:
        """The prompts of an iteration."""
        drawn = order_of(self.prompts.examples, self.config.data, self.config.seed)
        count, seed = len(self.prompts.examples), self.config.seed
        rows = next(stream.step_rows(count, self._size, 1.0, iterations, seed, iteration, drawn))
        return Asked(self.prompts.take(rows), seed * 1_000_003 + iteration)

    def _tokens(self, item: RolloutBatch | TokenBatch) -> int:
        """Tokens computed: PPO-ptx rows train the policy only."""
        if isinstance(item, TokenBatch):
            return item.tokens
        return item.batch.tokens * (len(self.trained) - self.critic_alone)

    def _minibatch(self, iteration: int, number: int) -> list[RolloutBatch | TokenBatch]:
        """This rank's micro-batches of the iteration's step `number`."""
        epoch, part = divmod(number, self.config.num_minibatches)
        seed = self.config.seed * 1_000_003 + iteration
        order = stream.epoch_order(self._size, seed, epoch)[part :: self.config.num_minibatches]
        batches: list[RolloutBatch | TokenBatch] = [*self._rollout_batches(order)]
        if self.ptx_examples and not self.critic_alone:
            step = iteration * self.steps_per_iteration + number
            count, size = len(self.ptx_examples), self.config.batch_size
            assert self.config.sft_data is not None
            drawn = order_of(self.ptx_examples, self.config.sft_data, self.config.seed)
            rows = next(stream.step_rows(count, size, 1.0, step + 1, self.config.seed, step, drawn))
            batches += own_batches([self.ptx_examples[i] for i in rows], self.config, self.policy)
        return batches

    def _rollout_batches(self, prompts: Sequence[int]) -> list[RolloutBatch]:
        """Micro-batches of this rank's of some prompts; their answers learn alone, so they may be
        split.
        """
        assert self.rollouts is not None
        k, most = self.config.samples_per_prompt, self.config.micro_batch_tokens
        examples = self.rollouts.examples
        prompts = distributed.mine(prompts, lambda i: packed_length(examples[i]))
        chosen = [examples[i] for i in prompts]
        rows = torch.tensor([i * k + j for i in prompts for j in range(k)], dtype=torch.long)
        batches = []
        padded = not all(model.packed for model in self.trained.values())
        for group in micro_batches(split_answers(chosen, most, padded), most, padded):
            count = sum(len(piece.answers) for piece in group)
            answers, rows = rows[:count], rows[count:]
            mask = self.rollouts.mask[answers]
            flat = [
                getattr(self.rollouts, name)[answers][mask]
                for name in ("log_probs", "advantages", "values", "returns")
            ]
            batches.append(RolloutBatch(pack(group), *flat))
        return batches

    def counts(self, item: RolloutBatch | TokenBatch) -> Mapping[str, float]:
        """What sums are divided by: generated tokens (see policy_norm), tokens of PPO-ptx rows."""
        if isinstance(item, TokenBatch):
            return {"ptx": item.target_ids.numel()}
        tokens = item.batch.target_ids.numel()
        constant = item.batch.answers * self.config.max_new_tokens
        whole = constant if self.config.policy_norm == "constant" else tokens
        policy = {} if self.critic_alone else {"policy_avg": whole}
        return policy | ({"value_avg": tokens} if self.critic else {})

    def loss(self, item: RolloutBatch | TokenBatch) -> LossSums:
        """Clipped policy loss + vf_coef x clipped value loss, or ptx_coef x NLL."""
        if isinstance(item, TokenBatch):
            nll = sft_loss(answer_log_probs(self.policy, item)).sum
            return LossSums({"ptx": self.config.ptx_coef * nll}, {})
        return self._clipped(item)

    def _clipped(self, item: RolloutBatch) -> LossSums:
        config, batch = self.config, item.batch
        count, trunk = float(batch.target_ids.numel()), trunk_of(self.policy)
        terms: dict[str, Tensor] = {}
        metrics: dict[str, tuple[Tensor | float, float]] = {}
        if not self.critic_alone:
            log_probs = answer_log_probs(self.policy, batch, config.temperature, trunk)
            policy = losses.policy_loss(
                log_probs,
                item.log_probs,
                item.advantages,
                cliprange=config.cliprange,
                clip_high=config.clip_high or None,
            )
            terms["policy_avg"] = policy.sum
            metrics |= {
                "policy/approxkl_avg": (policy.approxkl_sum, count),
                "policy/clipfrac_avg": (policy.clipfrac_sum, count),
                "val/ratio": (policy.ratio_sum, count),
            }
        if self.critic:
            value = losses.value_loss(
                token_values(self.critic, batch, trunk),
                item.values,
                item.returns,
                cliprange_value=config.cliprange_value,
            )
            terms["value_avg"] = config.vf_coef * value.sum
            metrics["val/clipfrac_avg"] = (value.clipfrac_sum, count)
        return LossSums(terms, metrics)

    def stepped(self, metrics: Mapping[str, float]) -> None:
        """Leaves the iteration's remaining passes once the policy has moved by `target_kl`; after
        the last one a reference that moves follows.
        """
        if self.sampler.moving and self.ends_iteration:
            self.sampler.moving.follow()
        if self.config.target_kl and "policy/approxkl_avg" in metrics:
            self.stopped_early |= metrics["policy/approxkl_avg"] > self.config.target_kl

    def evaluate(self) -> dict[str, float]:
        """Answers to held-out prompts: score, KL, length."""
        if not self.eval_prompts.examples:
            return {}
        asked, running = Asked(self.eval_prompts, 0), replace(self.running)
        _, _, metrics, _ = self.sampler.roll_out(asked, self.kl_coef, running, version=-1)
        return metrics

    @cached_property
    def fingerprint(self) -> str:
        """See Method; a Python reward function cannot be looked into."""
        examples = [*self.prompts.examples, *self.ptx_examples]
        return checkpoint.fingerprint(examples, self.fixed)

    def state_dict(self) -> dict[str, Any]:
        """The KL controller, the reference that moves, rollouts of the iteration under way, and
        answers that are being sampled for the next.
        """
        moving, engine = self.sampler.moving, self.sampler.engine
        begun = engine.begun if isinstance(engine, Ahead) else None
        return {
            "kl_coef": self.kl_coef,
            "running_scores": asdict(self.running),
            "stopped_early": self.stopped_early,
            "rollouts": self.rollouts.state if self.rollouts else None,
            "ahead": begun.kept if begun else None,
        } | ({"reference": dict(moving.average)} if moving else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See Method."""
        self.kl_coef, self.stopped_early = state["kl_coef"], state["stopped_early"]
        self.running = RunningScores(**state["running_scores"])
        if self.sampler.moving:
            self.sampler.moving.load(state["reference"])
        if state["rollouts"] is not None:
            self.rollouts = Rollouts.from_state(state["rollouts"])
        if isinstance(self.sampler.engine, Ahead):
            self.sampler.engine.begun = state["ahead"] and Begun.again(state["ahead"])

    def export(self, folder: Path) -> None:
        """The policy, and the critic as `value_model/`."""
        export_model(self.policy, folder / "model")
        if self.critic:
            export_model(self.critic, folder / "value_model")


def _bare(config: PPOConfig, models: Mapping[str, LoadedModel]) -> PPO:
    roles = (models.get(name) for name in ("policy", "critic", "reference"))
    sampler = Sampler(config, *roles, None, frozenset(), None)  # type: ignore[arg-type,call-arg]
    return PPO(config, sampler, Prompts((), (SMALLEST,)), [], Prompts((), ()), [])


def _bare_batch(batch: TokenBatch) -> RolloutBatch:
    return RolloutBatch(batch, *(torch.zeros(len(batch.target_ids)) for _ in range(4)))


WORK = Work("ppo", _bare, _bare_batch)


def build(
    config: PPOConfig,
    device: torch.device,
    run: Run,
    make_engine: MakeEngine = engine_for,
    load: Callable[..., LoadedModel] = load_policy,
) -> PPO:
    """Loads the models and prompts that the settings name; `load` gives the policy."""
    # 1. Policy and its frozen reference.
    policy = load(config.model, device, **model_options(config))
    stops = stop_token_ids(policy.tokenizer, policy.hf.generation_config)
    reference = penalised_from(config, policy)
    # 2. Prompts.
    functions = function_judge(*config.reward_function, weights=config.reward_weights)
    prompts, eval_prompts, ptx = read_for_ppo(config, policy, run, functions)
    asked = (*prompts.records, *eval_prompts.records)
    # 3. What scores, and the critic; they read tokens as they were trained to.
    rewards, critic = load_beside(config, policy)
    if rewards:
        each = [model_scorer(model, policy, asked, config, stops) for model in rewards]
        scorer = together(config.reward_models, each, config.reward_ensemble)
    else:
        judge = rubric_judge(config.judge, config) if config.judge else functions
        scorer = text_scorer(judge, stops)
    divide(config, [policy, critic, reference, *rewards])
    fixed = [model for model in (policy, reference, *rewards) if model]
    rate, engine = config.ema_reference, make_engine(config, policy)
    moving = MovingReference(policy, rate) if rate else None
    engine = Ahead(engine) if config.rollout_ahead else engine
    sampler = Sampler(config, policy, critic, reference, scorer, stops, engine, moving)
    method = PPO(config, sampler, prompts, ptx, eval_prompts, fixed)
    if method.critic_warmup * method.steps_per_iteration >= method.total_steps:
        raise UserError(
            f"--critic-warmup {method.critic_warmup} leaves no step of {method.total_steps} to the "
            f"policy ({method.steps_per_iteration} an iteration); lower it or train longer"
        )
    return method


def run(config: PPOConfig, make_engine: MakeEngine = engine_for) -> Run:
    """`prefloop ppo`: trains and returns the finished run."""
    run, device = start(config, "ppo")
    with run:
        if run.finished:
            return run
        config = planning.settle(WORK, config, run, device)
        method = build(config, device, run, make_engine)
        answers = [config.max_new_tokens] * config.samples_per_prompt
        rows = [example(len(p.prompt), answers) for p in method.prompts.examples]
        planning.announce(WORK, config, run, device, rows)
        rewards = [model for model in method.fixed if model.is_scorer]
        sampler = method.sampler
        monitor = load_monitor(
            config, method.policy, run, lambda *_: sampler.engine, sampler.reference, rewards
        )
        loop.train(method, config, run, monitor)
    return run
