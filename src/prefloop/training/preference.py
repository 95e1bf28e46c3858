"""DPO (arXiv 2305.18290) and its kin: preferences straight into the policy, no reward model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefloop.config import DPOConfig
from prefloop.data.batches import TokenBatch
from prefloop.data.tokenize import Example
from prefloop.generation.engine import in_process
from prefloop.generation.protocol import MakeEngine
from prefloop.losses import preference as losses
from prefloop.losses.masked import Total, masked_sum, segment_sum
from prefloop.losses.sft import sft_loss
from prefloop.models.export import export_model
from prefloop.models.heads import answer_log_probs
from prefloop.models.load import load_policy
from prefloop.models.model import LoadedModel
from prefloop.models.pieces import in_pieces
from prefloop.runs import Run
from prefloop.training import checkpoint, loop, planning, rows
from prefloop.training.full_rows import SMALLEST
from prefloop.training.kto import KTO, KTO_WORK
from prefloop.training.method import LossSums, Step
from prefloop.training.monitor import load_monitor
from prefloop.training.reference import MakeReference, NoReference, Reference, References
from prefloop.training.rehearsal import Work
from prefloop.training.start import divide, model_options, start
from prefloop.training.step import evaluate


class LogProbs(NamedTuple):
    """What a micro-batch's losses need of its A answers."""

    log_probs: Tensor  # [A] log pi(y|x), summed over tokens
    ref_log_probs: Tensor  # [A]; zeros without a reference
    lengths: Tensor  # [A] tokens
    token_log_probs: Tensor  # [N]


class Pairs(NamedTuple):
    """The same of M strictly ordered pairs."""

    log_probs: tuple[Tensor, ...]  # of the winners [M], of the losers [M]
    ref_log_probs: tuple[Tensor, ...]
    lengths: tuple[Tensor, ...]
    margins: Tensor  # [M]; zeros but with `sigmoid`


class PairLoss(NamedTuple):
    """A loss over pairs, by the settings, and whether it compares with a reference."""

    function: Callable[[Pairs, DPOConfig], Total]
    needs_reference: bool


def _sigmoid(pairs: Pairs, config: DPOConfig) -> Total:
    both = (*pairs.log_probs, *pairs.ref_log_probs)
    smoothing, margin = config.label_smoothing, pairs.margins
    return losses.sigmoid_loss(*both, beta=config.beta, label_smoothing=smoothing, margin=margin)


def _robust(pairs: Pairs, config: DPOConfig) -> Total:
    both = (*pairs.log_probs, *pairs.ref_log_probs)
    return losses.robust_loss(*both, beta=config.beta, label_smoothing=config.label_smoothing)


def _hinge(pairs: Pairs, config: DPOConfig) -> Total:
    return losses.hinge_loss(*pairs.log_probs, *pairs.ref_log_probs, beta=config.beta)


def _ipo(pairs: Pairs, config: DPOConfig) -> Total:
    both = (*pairs.log_probs, *pairs.ref_log_probs)
    chosen, rejected = pairs.lengths if config.ipo_average else (None, None)
    return losses.ipo_loss(
        *both, beta=config.beta, chosen_lengths=chosen, rejected_lengths=rejected
    )


def _apo_zero(pairs: Pairs, config: DPOConfig) -> Total:
    return losses.apo_zero_loss(*pairs.log_probs, *pairs.ref_log_probs, beta=config.beta)


def _sigmoid_norm(pairs: Pairs, config: DPOConfig) -> Total:
    both = (*pairs.log_probs, *pairs.ref_log_probs, *pairs.lengths)
    return losses.sigmoid_norm_loss(*both, beta=config.beta)


def _simpo(pairs: Pairs, config: DPOConfig) -> Total:
    both = (*pairs.log_probs, *pairs.lengths)
    return losses.simpo_loss(*both, beta=config.beta, gamma=config.simpo_gamma)


def _orpo(pairs: Pairs, config: DPOConfig) -> Total:
    return losses.orpo_loss(*pairs.log_probs, *pairs.lengths)


PAIR_LOSSES: Mapping[str, PairLoss] = {
    "sigmoid": PairLoss(_sigmoid, True),
    "sigmoid-norm": PairLoss(_sigmoid_norm, True),
    "robust": PairLoss(_robust, True),
    "hinge": PairLoss(_hinge, True),
    "ipo": PairLoss(_ipo, True),
    "apo-zero": PairLoss(_apo_zero, True),
    "simpo": PairLoss(_simpo, False),
    "orpo": PairLoss(_orpo, False),
}
"""By --loss; `plackett-luce` compares whole rankings, and `kto` has a method of its own."""


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
        make_reference: MakeReference = Reference,
    ) -> None:
        self.config, self.policy, self.examples = config, policy, examples
        self.trained = {"policy": policy}
        self.total_steps = rows.total_steps(config, len(examples))
        self.eval_examples = eval_examples
        self.pair_loss = None if config.loss == "plackett-luce" else PAIR_LOSSES[config.loss]
        self.reference: References | None = None
        if self.pair_loss is None or self.pair_loss.needs_reference:
            self.reference = make_reference(config, policy, [*examples, *eval_examples], cache)

    def steps(self, start_step: int) -> Iterator[Step[TokenBatch]]:
        """See Method."""
        return rows.supervised_steps(self.examples, self.config, self.policy, start_step)

    def counts(self, batch: TokenBatch) -> Mapping[str, float]:
        """Pairs (rankings for Plackett-Luce), and tokens of chosen answers."""
        chosen = sum(
            sum(mask)
            for e in batch.examples
            if self._uses_nll
            for i, mask in enumerate(e.answer_masks)
            if i in e.tiers[0]
        )
        if self.pair_loss is None:
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

    def loss(self, batch: TokenBatch) -> LossSums:
        """The chosen loss over pairs or rankings, and alpha * NLL(chosen) where asked."""
        config = self.config
        answers, (winners, losers) = self._log_probs(batch), batch.pairs()
        if self.pair_loss is None:
            total = losses.plackett_luce_dpo_loss(
                batch.by_example(answers.log_probs),
                batch.by_example(answers.ref_log_probs),
                batch.tiers(),
                beta=config.beta,
            )
        else:
            pi, ref, lengths = ((x[winners], x[losers]) for x in answers[:3])
            margins = batch.margins().flatten()[batch.answer_example[winners]]
            total = self.pair_loss.function(Pairs(pi, ref, lengths, margins), config)
        weight = config.orpo_lambda if config.loss == "orpo" else 1.0
        terms = {"preference": weight * total.sum}
        if self._uses_nll:
            alpha = 1.0 if config.loss == "orpo" else config.sft_coefficient
            chosen = answers.token_log_probs[self._token_in_chosen(batch)]
            terms["nll"] = alpha * sft_loss(chosen).sum
        return LossSums(terms, self._metrics(answers, winners, losers))

    def _log_probs(self, batch: TokenBatch) -> LogProbs:
        most = self.config.micro_batch_tokens
        tokens = in_pieces(answer_log_probs, self.policy, batch, most)
        log_probs = segment_sum(tokens, batch.target_answer, batch.answers)
        ref = self.reference.of(batch) if self.reference else torch.zeros_like(log_probs)
        lengths = torch.bincount(batch.target_answer, minlength=batch.answers)
        return LogProbs(log_probs, ref, lengths, tokens)

    @torch.no_grad()
    def _metrics(
        self, answers: LogProbs, winners: Tensor, losers: Tensor
    ) -> dict[str, tuple[Tensor | float, float]]:
        """TRL's names; implicit rewards are beta (log pi - log pi_ref)."""
        pairs = float(len(winners))
        shift = answers.log_probs - answers.ref_log_probs
        reward = self.config.beta * shift
        if self.config.loss in ("simpo", "sigmoid-norm"):  # their implicit reward is per token
            reward = reward / answers.lengths
        chosen, rejected = reward[winners], reward[losers]
        correct = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
        metrics = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": correct,
            "logps/chosen": answers.log_probs[winners],
            "logps/rejected": answers.log_probs[losers],
        }
        if self.reference:
            metrics["logps/chosen_shift"] = shift[winners]  # displacement of the chosen answer
            metrics["kl/forward"] = -(shift[winners] + shift[losers]) / 2
        return {name: (masked_sum(value), pairs) for name, value in metrics.items()}

    def stepped(self, metrics: Mapping[str, float]) -> None:
        """See Method."""

    def evaluate(self) -> dict[str, float]:
        """See Method."""
        batches = rows.own_batches(self.eval_examples, self.config, self.policy)
        return evaluate(self, batches, self.policy.device)

    @cached_property
    def fingerprint(self) -> str:
        """See Method."""
        digest = self.reference.digest if self.reference else ""
        return checkpoint.fingerprint(self.examples, [self.policy], digest)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: rows follow from seed and step, the reference from the start."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See Method."""

    def export(self, folder: Path) -> None:
        """See Method."""
        export_model(self.policy, folder / "model")


def work(config: DPOConfig) -> Work:
    """What is done by the chosen loss, to be planned."""
    if config.loss == "kto":
        return KTO_WORK
    return Work(
        "dpo",
        lambda config, models: Preference(
            config, models["policy"], [SMALLEST], [], Path(), NoReference
        ),
    )


def run(config: DPOConfig, make_engine: MakeEngine = in_process) -> Run:
    """`prefloop dpo`: trains and returns the finished run."""
    run, device = start(config, "dpo")
    with run:
        if run.finished:
            return run
        config = planning.settle(work(config), config, run, device)
        policy = load_policy(config.model, device, **model_options(config))
        kind: rows.Kind = "unpaired" if config.loss == "kto" else "preference"
        refused = "" if config.loss == "sigmoid" else config.loss
        margins = config.label_margins
        examples, held_out = rows.read_examples(
            config, kind, policy, run, refuse_margins=refused, label_margins=margins
        )
        cache = run.directory / "reference_log_probs.safetensors"
        method = KTO if config.loss == "kto" else Preference
        planning.announce(work(config), config, run, device, examples)
        monitor = load_monitor(config, policy, run, make_engine)
        divide(config, [policy, monitor.start if monitor else None])
        loop.train(method(config, policy, examples, held_out, cache), config, run, monitor)
    return run
