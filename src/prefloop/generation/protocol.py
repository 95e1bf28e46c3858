"""What PPO, sample and compare ask of whatever writes their answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from prefloop.config import CompareConfig, GenerateConfig, MonitorConfig, SampleConfig
from prefloop.generation.sampler import Sampling
from prefloop.models.model import LoadedModel

Prompts = Sequence[Sequence[int]]
EngineConfig = MonitorConfig | SampleConfig | GenerateConfig | CompareConfig


@dataclass(frozen=True)
class Sample:
    """One answer: its tokens with the stop token that ended it, and their log-probs in nats."""

    prompt_index: int
    sample_index: int
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]  # under the whole distribution at the sampling temperature
    finish_reason: Literal["stop", "length"]
    weights_version: int


class RolloutEngine(Protocol):
    """Answers to many prompts."""

    def generate(
        self,
        prompts: Prompts,
        n: int,
        sampling: Sampling,
        seed: int,
        numbers: Sequence[int] | None = None,
        on_done: Callable[[Sample], None] | None = None,
    ) -> list[list[Sample]]:
        """n samples of each prompt, in the prompts' order; `on_done` is told of each as it ends.

        A sample depends on (seed, number, sample_index) and its prompt, not on its company;
        `numbers` are the prompts' places among all ranks' prompts, their indices where not given.
        """
        ...

    def sync(self, model: LoadedModel, version: int) -> None:
        """Samples from the model's present weights from now on; they are told as `version`."""
        ...


MakeEngine = Callable[[EngineConfig, LoadedModel], RolloutEngine]
"""An engine for a model, as the settings ask; `engine.in_process` unless another is given."""
