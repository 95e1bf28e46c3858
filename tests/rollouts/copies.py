"""An engine that samples from a copy of the weights, as a server does, in this process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from prefloop.generation.engine import Engine
from prefloop.generation.protocol import EngineConfig, Prompts, Sample
from prefloop.generation.sampler import Sampling
from prefloop.models.model import LoadedModel


class Copied:
    """A RolloutEngine on a copy that `sync` brings up to date."""

    def __init__(self, config: EngineConfig, model: LoadedModel) -> None:
        self.model = copy.deepcopy(model)
        self.engine = Engine(self.model, config.max_concurrent)

    def generate(
        self,
        prompts: Prompts,
        n: int,
        sampling: Sampling,
        seed: int,
        numbers: Sequence[int] | None = None,
        on_done: Callable[[Sample], None] | None = None,
    ) -> list[list[Sample]]:
        return self.engine.generate(prompts, n, sampling, seed, numbers, on_done)

    def sync(self, model: LoadedModel, version: int) -> None:
        self.model.module.load_state_dict(model.module.state_dict())
        self.engine.sync(self.model, version)
