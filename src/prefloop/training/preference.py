"""DPO (arXiv 2305.18290) and its kin: preferences straight into the policy, no reward model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefloop import distributed
from prefloop.config import DPOConfig
from prefloop.data.batches import TokenBatch, to_batches
from prefloop.data.tokenize import Example
from prefloop.losses import preference as losses
from prefloop.losses.masked import Total, masked_sum, segment_sum
from prefloop.losses.sft import sft_loss
from prefloop.models.export import export_model
from prefloop.models.heads import answer_log_probs
from prefloop.models.load import load_policy
from prefloop.models.model import LoadedModel
from prefloop.models.precision import autocast
from prefloop.runs import Run
from prefloop.training import checkpoint, loop, rows
from prefloop.training.loop import LossSums, Step
from prefloop.training.reference import mismatched, reference_log_probs

WITHOUT_REFERENCE = ("simpo", "orpo")


class Answers(NamedTuple):
    """What a micro-batch's losses need of its A answers."""

    log_probs: Tensor  # [A] log pi(y|x), summed over tokens
    ref_log_probs: Tensor  # [A]
    lengths: Tensor  # [A] tokens
    token_log_probs: Tensor  # [N]


class MicroBatch(NamedTuple):
    """Packed prompts with their answers, and for KTO the step's KL estimate."""

    batch: TokenBatch
    kl_estimate: float


class Preference:
    """The method: each micro-batch holds prompts with 2..K answers, each computed once."""

    learning_rates: Mapping[str, float] = {}

    def __init__(
        self,
        config: DPOConfig,
        policy: LoadedModel,
        examples: list[Example],
        eval_examples: list[Example],
        cache: Path,
    ) -> None:
        self.config, self.policy, self.examples = config, policy, examples
        self.eval_examples = eval_examples
        self.mismatched = mismatched(examples) if config.loss == "kto" else []
        self.eval_mismatched = mismatched(eval_examples) if config.loss == "kto" else []
        self.references: dict[int, Tensor] = {}  # by id() of the example: log-probs of its answers
        if config.loss not in WITHOUT_REFERENCE:
            everything = [*examples, *eval_examples, *self.mismatched, *self.eval_mismatched]
            parts = reference_log_probs(config, policy, everything, cache)
            self.references = {id(e): part for e, part in zip(everything, parts, strict=True)}

    @property
    def trained(self) -> Mapping[str, LoadedModel]:
        """See Method."""
        return {"policy": self.policy}

    @property
    def total_steps(self) -> int:
        """See Method."""
        return rows.total_steps(self.config, len(self.examples))

    def steps(self, start_step: int) -> Iterator[Step[MicroBatch]]:
        """See Method; for KTO each step first measures its KL estimate with the newest weights."""
        device = self.policy.device
        other = {id(e): m for e, m in zip(self.examples, self.mismatched, strict=False)}
        for step in rows.supervised_steps(self.examples, self.config, device, start_step):
            estimate = 0.0
            if self.config.loss == "kto":
                partners = [other[id(e)] for batch in step.batches for e in batch.examples]
                estimate = self._kl_estimate(partners)
            yield Step([MicroBatch(batch, estimate) for batch in step.batches], step.tokens)

    def counts(self, item: MicroBatch) -> Mapping[str, float]:
        """Pairs (rankings for Plackett-Luce, answers for KTO), and tokens of chosen answers."""
        batch = item.batch
        chosen = sum(
            sum(mask)
            for e in batch.examples
            if self._uses_nll
            for i, mask in enumerate(e.answer_masks)
            if i in e.tiers[0]
        )
        if self.config.loss == "kto":
            return {"preference": batch.answers}
        if self.config.loss == "plackett-luce":
            return {"preference": len(batch.examples), "nll": chosen}
        return {"preference": len(batch.pairs()[0]), "nll": chosen}

    @property
    def _uses_nll(self) -> bool:
        return self.config.loss == "orpo" or self.config.sft_coefficient > 0

    def _token_in_chosen(self, batch: TokenBatch) -> Tensor:
        """[N] whether a loss token belongs to an answer of its prompt's best tier."""
        best = torch.tensor(
            [i in e.tiers[0] for e in batch.examples for i in range(len(e.answers))],
            device=batch.input_ids.device,
        )
        return best[batch.target_answer]

    def loss(self, item: MicroBatch) -> LossSums:
        """The chosen loss over pairs, and alpha * NLL(chosen) where asked."""
        batch, config = item.batch, self.config
        answers = self._answers(batch)
        if config.loss == "kto":
            return self._kto(batch, answers, item.kl_estimate)
        if config.loss == "plackett-luce":
            total = losses.plackett_luce_dpo_loss(
                batch.by_example(answers.log_probs),
                batch.by_example(answers.ref_log_probs),
                batch.tiers(),
                beta=config.beta,
            )
        else:
            total = self._pair_loss(answers, *batch.pairs())
        weight = config.orpo_lambda if config.loss == "orpo" else 1.0
        terms = {"preference": weight * total.sum}
        if self._uses_nll:
            alpha = 1.0 if config.loss == "orpo" else config.sft_coefficient
            chosen = answers.token_log_probs[self._token_in_chosen(batch)]
            terms["nll"] = alpha * sft_loss(chosen).sum
        return LossSums(terms, self._metrics(answers, *batch.pairs()))

    def _answers(self, batch: TokenBatch) -> Answers:
        tokens = answer_log_probs(self.policy, batch)
        log_probs = segment_sum(tokens, batch.target_answer, batch.answers)
        lengths = torch.bincount(batch.target_answer, minlength=batch.answers)
        if self.references:
            ref = torch.cat([self.references[id(e)] for e in batch.examples]).to(log_probs.device)
        else:
            ref = torch.zeros_like(log_probs)
        return Answers(log_probs, ref, lengths, tokens)

    def _pair_loss(self, answers: Answers, winners: Tensor, losers: Tensor) -> Total:
        config = self.config
        pi, ref, n = answers.log_probs, answers.ref_log_probs, answers.lengths
        chosen, rejected = pi[winners], pi[losers]
        four = (chosen, rejected, ref[winners], ref[losers])
        if config.loss == "sigmoid":
            return losses.sigmoid_loss(
                *four, beta=config.beta, label_smoothing=config.label_smoothing
            )
        if config.loss == "robust":
            return losses.robust_loss(
                *four, beta=config.beta, label_smoothing=config.label_smoothing
            )
        if config.loss == "hinge":
            return losses.hinge_loss(*four, beta=config.beta)
        if config.loss == "ipo":
            lengths = (n[winners], n[losers]) if config.ipo_average else (None, None)
            return losses.ipo_loss(
                *four, beta=config.beta, chosen_lengths=lengths[0], rejected_lengths=lengths[1]
            )
        if config.loss == "simpo":
            return losses.simpo_loss(
                chosen, rejected, n[winners], n[losers], beta=config.beta, gamma=config.simpo_gamma
            )
        return losses.orpo_loss(chosen, rejected, n[winners], n[losers])

    @torch.no_grad()
    def _metrics(
        self, answers: Answers, winners: Tensor, losers: Tensor
    ) -> dict[str, tuple[Tensor | float, float]]:
        """TRL's names; implicit rewards are beta (log pi - log pi_ref)."""
        pairs = float(len(winners))
        pi = answers.log_probs
        if self.config.loss == "simpo":  # its implicit reward is the average log-prob
            pi = pi / answers.lengths
        shift = pi - answers.ref_log_probs
        chosen, rejected = self.config.beta * shift[winners], self.config.beta * shift[losers]
        correct = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
        metrics = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": correct,
            "logps/chosen": answers.log_probs[winners],
            "logps/rejected": answers.log_probs[losers],
        }
        if self.references:
            metrics["logps/chosen_shift"] = shift[winners]  # displacement of the chosen answer
            metrics["kl/forward"] = -(shift[winners] + shift[losers]) / 2
        return {name: (masked_sum(value), pairs) for name, value in metrics.items()}

    def _kto(self, batch: TokenBatch, answers: Answers, kl_estimate: float) -> LossSums:
        labels = torch.tensor([e.labels[0] for e in batch.examples], device=batch.input_ids.device)
        total = losses.kto_loss(
            answers.log_probs,
            answers.ref_log_probs,
            labels,
            kl_estimate,
            beta=self.config.beta,
            desirable_weight=self.config.desirable_weight,
            undesirable_weight=self.config.undesirable_weight,
        )
        good = float(sum(e.labels[0] for e in batch.examples))
        sides = {"chosen": (labels, good), "rejected": (~labels, batch.answers - good)}
        metrics: dict[str, tuple[Tensor | float, float]] = {}
        with torch.no_grad():
            shift = answers.log_probs - answers.ref_log_probs
            for name, (side, count) in sides.items():
                metrics[f"rewards/{name}"] = (self.config.beta * masked_sum(shift, side), count)
                metrics[f"logps/{name}"] = (masked_sum(answers.log_probs, side), count)
            metrics["logps/chosen_shift"] = (masked_sum(shift, labels), good)
            metrics["kl"] = (kl_estimate * batch.answers, batch.answers)
            metrics["kl/forward"] = (masked_sum(-shift), batch.answers)
        return LossSums({"preference": total.sum}, metrics)

    @torch.no_grad()
    def _kl_estimate(self, partners: list[Example]) -> float:
        """max(0, mean log-ratio of mismatched answers) over the whole step (KTO, section 4.1)."""
        total = {"sum": 0.0, "count": 0.0}
        device = self.policy.device
        for batch in to_batches(partners, self.config.micro_batch_tokens, device):
            with autocast(device, self.config.dtype):
                answers = self._answers(batch)
            total["sum"] += float((answers.log_probs - answers.ref_log_probs).sum())
            total["count"] += batch.answers
        total = distributed.sum_mapping(total, device)
        return max(0.0, total["sum"] / total["count"])

    def evaluate(self) -> dict[str, float]:
        """See Method."""
        device = self.policy.device
        estimate = self._kl_estimate(self.eval_mismatched) if self.eval_mismatched else 0.0
        mine = distributed.mine(self.eval_examples)
        batches = to_batches(mine, self.config.micro_batch_tokens, device)
        items = [MicroBatch(batch, estimate) for batch in batches]
        return loop.evaluate(self, items, device, self.config.dtype)

    @cached_property
    def fingerprint(self) -> str:
        """See Method; the reference's log-probs stand for its weights."""
        fixed = [*self.references.values(), *checkpoint.frozen(self.policy.module)]
        return checkpoint.fingerprint(self.examples, fixed)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: rows follow from seed and step, the reference from the start."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See Method."""

    def export(self, folder: Path) -> None:
        """See Method."""
        export_model(self.policy, folder / "model")


def run(config: DPOConfig) -> Run:
    """`prefloop dpo`: trains and returns the finished run."""
    run, device = loop.start(config, "dpo")
    with run:
        if run.finished:
            return run
        policy = load_policy(config.model, device, **loop.model_options(config))
        kind: rows.Kind = "unpaired" if config.loss == "kto" else "preference"
        examples, held_out = rows.read_examples(config, kind, policy, run)
        rows.refuse_margins([*examples, *held_out], config.loss)
        cache = run.directory / "reference_log_probs.safetensors"
        loop.train(Preference(config, policy, examples, held_out, cache), config, run)
    return run
