"""Supervised fine-tuning: negative log-likelihood of the answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from prefloop.config import SFTConfig
from prefloop.data.batches import TokenBatch
from prefloop.data.tokenize import Example
from prefloop.generation.engine import in_process
from prefloop.generation.protocol import MakeEngine
from prefloop.losses.sft import sft_loss
from prefloop.models.export import export_model
from prefloop.models.heads import answer_log_probs
from prefloop.models.load import load_policy
from prefloop.models.model import LoadedModel
from prefloop.runs import Run
from prefloop.training import checkpoint, loop, planning, rows
from prefloop.training.full_rows import SMALLEST
from prefloop.training.method import LossSums, Step
from prefloop.training.monitor import load_monitor
from prefloop.training.rehearsal import Work
from prefloop.training.start import divide, model_options, start
from prefloop.training.step import evaluate


class SFT:
    """The method: every answer token counts the same, over the whole step."""

    learning_rates: Mapping[str, float] = {}

    def __init__(
        self,
        config: SFTConfig,
        policy: LoadedModel,
        examples: list[Example],
        eval_examples: list[Example],
    ) -> None:
        self.config, self.policy, self.examples = config, policy, examples
        self.trained = {"policy": policy}
        self.total_steps = rows.total_steps(config, len(examples))
        self.eval_batches = rows.own_batches(eval_examples, config, policy)

    def steps(self, start_step: int) -> Iterator[Step[TokenBatch]]:
        """See Method."""
        return rows.supervised_steps(self.examples, self.config, self.policy, start_step)

    def counts(self, batch: TokenBatch) -> Mapping[str, float]:
        """Answer tokens."""
        return {"sft": batch.target_ids.numel()}

    def loss(self, batch: TokenBatch) -> LossSums:
        """L = -sum_t log pi(y_t | .) / N."""
        log_probs = answer_log_probs(self.policy, batch)
        return LossSums({"sft": sft_loss(log_probs).sum}, {})

    def stepped(self, metrics: Mapping[str, float]) -> None:
        """See Method."""

    def evaluate(self) -> dict[str, float]:
        """See Method."""
        return evaluate(self, self.eval_batches, self.policy.device)

    @cached_property
    def fingerprint(self) -> str:
        """See Method."""
        return checkpoint.fingerprint(self.examples, [self.policy])

    def state_dict(self) -> dict[str, Any]:
        """Nothing: rows follow from seed and step."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See Method."""

    def export(self, folder: Path) -> None:
        """See Method."""
        export_model(self.policy, folder / "model")


WORK = Work("sft", lambda config, models: SFT(config, models["policy"], [SMALLEST], []))


def run(config: SFTConfig, make_engine: MakeEngine = in_process) -> Run:
    """`prefloop sft`: trains and returns the finished run."""
    run, device = start(config, "sft")
    with run:
        if run.finished:
            return run
        config = planning.settle(WORK, config, run, device)
        policy = load_policy(config.model, device, **model_options(config))
        examples, held_out = rows.read_examples(
            config, "demonstration", policy, run, config.train_on
        )
        planning.announce(WORK, config, run, device, examples)
        monitor = load_monitor(config, policy, run, make_engine)
        divide(config, [policy, monitor.start if monitor else None])
        loop.train(SFT(config, policy, examples, held_out), config, run, monitor)
    return run
