"""KTO (arXiv 2402.01306): single answers judged good or bad, straight into the policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefloop import distributed
from prefloop.config import DPOConfig
from prefloop.data.batches import TokenBatch, packed_length, to_batches
from prefloop.data.tokenize import Example
from prefloop.losses.masked import masked_sum, segment_sum
from prefloop.losses.preference import kto_loss
from prefloop.models.export import export_model
from prefloop.models.heads import answer_log_probs
from prefloop.models.model import LoadedModel
from prefloop.models.sharding import in_step
from prefloop.training import checkpoint, rows
from prefloop.training.full_rows import SMALLEST
from prefloop.training.method import LossSums, Step
from prefloop.training.reference import (
    MakeReference,
    NoReference,
    Reference,
    References,
    mismatched,
)
from prefloop.training.rehearsal import Work
from prefloop.training.step import evaluate


class WithEstimate(NamedTuple):
    """Packed prompts with one answer each, and the whole step's estimate of KL(pi || pi_ref)."""

    batch: TokenBatch
    kl_estimate: float

    def to(self, device: torch.device | str) -> WithEstimate:
        """See Movable."""
        return WithEstimate(self.batch.to(device), self.kl_estimate)


class KTO:
    """The method: each step first measures its KL estimate with the newest weights."""

    learning_rates: Mapping[str, float] = {}

    def __init__(
        self,
        config: DPOConfig,
        policy: LoadedModel,
        examples: list[Example],
        eval_examples: list[Example],
        cache: Path,
        make_reference: MakeReference = Reference,
    ) -> None:
        self.config, self.policy, self.examples = config, policy, examples
        self.trained = {"policy": policy}
        self.total_steps = rows.total_steps(config, len(examples))
        self.eval_examples = eval_examples
        self.mismatched = mismatched(examples)
        self.eval_mismatched = mismatched(eval_examples)
        everything = [*examples, *eval_examples, *self.mismatched, *self.eval_mismatched]
        self.reference: References = make_reference(config, policy, everything, cache)

    def steps(self, start_step: int) -> Iterator[Step[WithEstimate]]:
        """See Method."""
        other = {id(e): m for e, m in zip(self.examples, self.mismatched, strict=True)}
        for chosen in rows.examples_of_steps(self.examples, self.config, start_step):
            items = self._items(chosen, [other[id(e)] for e in chosen])
            yield Step(items, sum(item.batch.tokens for item in items))

    def _items(self, chosen: list[Example], partners: list[Example]) -> list[WithEstimate]:
        """This rank's, of all ranks' rows and the mismatched answers that their KL is measured on;
        each of the two is divided by its own tokens.
        """
        estimate = self._kl_estimate(distributed.mine(partners, packed_length))
        batches = rows.own_batches(chosen, self.config, self.policy)
        return [WithEstimate(batch, estimate) for batch in batches]

    def counts(self, item: WithEstimate) -> Mapping[str, float]:
        """Answers."""
        return {"preference": item.batch.answers}

    def loss(self, item: WithEstimate) -> LossSums:
        """lambda_D (1 - sigma(beta (c - z))) if good, lambda_U (1 - sigma(beta (z - c))) if not."""
        batch, estimate, config = item.batch, item.kl_estimate, self.config
        log_probs, ref_log_probs = self._log_probs(batch), self.reference.of(batch)
        labels = torch.tensor([e.labels[0] for e in batch.examples], device=log_probs.device)
        total = kto_loss(
            log_probs,
            ref_log_probs,
            labels,
            estimate,
            beta=config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )
        good = float(sum(e.labels[0] for e in batch.examples))
        sides = {"chosen": (labels, good), "rejected": (~labels, batch.answers - good)}
        metrics: dict[str, tuple[Tensor | float, float]] = {}
        with torch.no_grad():
            shift = log_probs - ref_log_probs
            for name, (side, count) in sides.items():
                metrics[f"rewards/{name}"] = (config.beta * masked_sum(shift, side), count)
                metrics[f"logps/{name}"] = (masked_sum(log_probs, side), count)
            metrics["logps/chosen_shift"] = (masked_sum(shift, labels), good)
            metrics["kl"] = (estimate * batch.answers, batch.answers)
            metrics["kl/forward"] = (masked_sum(-shift), batch.answers)
        return LossSums({"preference": total.sum}, metrics)

    def _log_probs(self, batch: TokenBatch) -> Tensor:
        tokens = answer_log_probs(self.policy, batch)
        return segment_sum(tokens, batch.target_answer, batch.answers)

    @torch.no_grad()
    def _kl_estimate(self, partners: list[Example]) -> float:
        """max(0, mean log-ratio of all ranks' mismatched answers) (section 4.1)."""
        total = {"sum": 0.0, "count": 0.0}
        device, most = self.policy.device, self.config.micro_batch_tokens
        with in_step([self.policy]):
            for batch in to_batches(partners, most, device, not self.policy.packed):
                total["sum"] += float((self._log_probs(batch) - self.reference.of(batch)).sum())
                total["count"] += batch.answers
        total = distributed.sum_mapping(total, device)
        return max(0.0, total["sum"] / total["count"])

    def stepped(self, metrics: Mapping[str, float]) -> None:
        """See Method."""

    def evaluate(self) -> dict[str, float]:
        """See Method."""
        if not self.eval_examples:
            return {}
        items = self._items(self.eval_examples, self.eval_mismatched)
        return evaluate(self, items, self.policy.device)

    @cached_property
    def fingerprint(self) -> str:
        """See Method."""
        return checkpoint.fingerprint(self.examples, [self.policy], self.reference.digest)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: rows follow from seed and step, the reference from the start."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See Method."""

    def export(self, folder: Path) -> None:
        """See Method."""
        export_model(self.policy, folder / "model")


KTO_WORK = Work(
    "dpo",
    lambda config, models: KTO(config, models["policy"], [SMALLEST], [], Path(), NoReference),
    lambda batch: WithEstimate(batch, 0.0),
)
