"""Reward model from rankings (InstructGPT, arXiv 2203.02155): one forward an answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from math import comb
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefloop.config import RewardConfig
from prefloop.data.batches import TokenBatch, to_batches
from prefloop.data.tokenize import Example
from prefloop.losses import reward as losses
from prefloop.losses.masked import Total
from prefloop.models.export import export_model
from prefloop.models.heads import answer_scores, score_mean
from prefloop.models.load import load_scorer
from prefloop.models.model import SCORE_POSITION, LoadedModel
from prefloop.models.pieces import in_pieces, split_answers
from prefloop.models.sharding import in_step
from prefloop.runs import Run
from prefloop.training import checkpoint, loop, planning, rows
from prefloop.training.full_rows import SMALLEST
from prefloop.training.method import LossSums, Step
from prefloop.training.rehearsal import Work
from prefloop.training.start import divide, model_options, start
from prefloop.training.step import evaluate

LEARN_FROM_TIES = ("rao-kupper", "davidson")  # losses to which ties are pairs, too
STATISTICS_PROMPTS = 512  # training prompts whose answers give the stored mean and deviation


class Reward:
    """The method: a loss over the scores of each prompt's answers."""

    learning_rates: Mapping[str, float] = {}

    def __init__(
        self,
        config: RewardConfig,
        scorer: LoadedModel,
        examples: list[Example],
        eval_examples: list[Example],
    ) -> None:
        self.config, self.scorer, self.examples = config, scorer, examples
        self.trained = {"scorer": scorer}
        self.total_steps = rows.total_steps(config, len(examples))
        self.eval_batches = rows.own_batches(eval_examples, config, scorer)

    def steps(self, start_step: int) -> Iterator[Step[TokenBatch]]:
        """See Method."""
        return rows.supervised_steps(self.examples, self.config, self.scorer, start_step)

    def counts(self, batch: TokenBatch) -> Mapping[str, float]:
        """Prompts or pairs, and answers for the centring term."""
        by_prompt = self.config.normalize == "prompt" or self.config.loss == "plackett-luce"
        size = sum(1 if by_prompt else self._pairs(e) for e in batch.examples)
        return {"ranking": size, "center": batch.answers}

    def _pairs(self, example: Example) -> int:
        if self.config.loss in LEARN_FROM_TIES:
            return comb(len(example.answers), 2)
        return _strict_pairs(example)

    def loss(self, batch: TokenBatch) -> LossSums:
        """The ranking loss, and c * sum(score^2) where asked."""
        flat = in_pieces(answer_scores, self.scorer, batch, self.config.micro_batch_tokens)
        scores, tiers = batch.by_example(flat), batch.tiers()
        terms = {"ranking": self._ranking_loss(scores, tiers, batch.margins()).sum}
        center = losses.centering_loss(scores, tiers)
        if self.config.center_coefficient:
            terms["center"] = self.config.center_coefficient * center.sum
        with torch.no_grad():
            accuracy = losses.ranking_accuracy(scores, tiers)
            total = torch.where(tiers >= 0, scores, 0.0).sum()
        return LossSums(
            terms,
            {
                "accuracy": (accuracy.sum, float(sum(map(_strict_pairs, batch.examples)))),
                "scores/mean": (total, batch.answers),
                "scores/mean_square": (center.sum, batch.answers),
            },
        )

    def _ranking_loss(self, scores: Tensor, tiers: Tensor, margins: Tensor) -> Total:
        config = self.config
        if config.loss == "plackett-luce":
            return losses.plackett_luce_loss(scores, tiers)
        if config.loss == "rao-kupper":
            return losses.rao_kupper_loss(scores, tiers, config.tie_parameter, config.normalize)
        if config.loss == "davidson":
            return losses.davidson_loss(scores, tiers, config.tie_parameter, config.normalize)
        return losses.bradley_terry_loss(scores, tiers, margins, config.normalize)

    def stepped(self, metrics: Mapping[str, float]) -> None:
        """See Method."""

    def evaluate(self) -> dict[str, float]:
        """See Method."""
        return evaluate(self, self.eval_batches, self.scorer.device)

    @cached_property
    def fingerprint(self) -> str:
        """See Method."""
        return checkpoint.fingerprint(self.examples, [self.scorer])

    def state_dict(self) -> dict[str, Any]:
        """Nothing: rows follow from seed and step."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See Method."""

    def export(self, folder: Path) -> None:
        """A sequence-classification folder whose config holds the scores' mean and deviation.

        Transformers' heads have no bias to shift, so the mean is stored and prefloop subtracts it.
        """
        scores = self._training_scores()
        config = self.scorer.config
        config.reward_mean = score_mean(self.scorer) + float(scores.mean())
        config.reward_std = float(scores.std())
        export_model(self.scorer, folder / "model")

    @torch.no_grad()
    def _training_scores(self) -> Tensor:
        stride = -(-len(self.examples) // STATISTICS_PROMPTS)
        most, padded = self.config.micro_batch_tokens, not self.scorer.packed
        device, pieces = self.scorer.device, split_answers(self.examples[::stride], most, padded)
        scores = []
        with in_step([self.scorer]):
            for batch in to_batches(pieces, most, device, padded):
                scores.append(answer_scores(self.scorer, batch))
        return torch.cat(scores)


WORK = Work("reward", lambda config, models: Reward(config, models["reward model"], [SMALLEST], []))


def _strict_pairs(example: Example) -> int:
    return comb(len(example.answers), 2) - sum(comb(len(tier), 2) for tier in example.tiers)


def run(config: RewardConfig) -> Run:
    """`prefloop reward`: trains and returns the finished run."""
    run, device = start(config, "reward")
    with run:
        if run.finished:
            return run
        config = planning.settle(WORK, config, run, device)
        scorer = load_scorer(config.model, device, seed=config.seed, **model_options(config))
        # What is trained now is scored as Transformers does, whatever it began from.
        setattr(scorer.config, SCORE_POSITION, "rendered")
        scorer.encoder.trains = True
        loss = config.loss
        refused = "" if loss == "bradley-terry" else loss
        ties, margins = loss in LEARN_FROM_TIES, config.label_margins
        examples, held_out = rows.read_examples(
            config, "preference", scorer, run, "answer", ties, refused, margins
        )
        planning.announce(WORK, config, run, device, examples)
        divide(config, [scorer])
        loop.train(Reward(config, scorer, examples, held_out), config, run)
    return run
