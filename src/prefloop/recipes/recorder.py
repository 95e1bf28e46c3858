"""What a policy writes while it learns, kept so that it can be judged later."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from prefloop.files import append, drop_cut_line
from prefloop.generation.protocol import Prompts, RolloutEngine, Sample
from prefloop.generation.sampler import Sampling
from prefloop.models.model import LoadedModel


class Recorder:
    """A RolloutEngine that keeps what it samples in a file, to be judged later.

    A line an iteration: its number, and each prompt with its answers. An iteration that is sampled
    again after an interrupt stands twice; the later line counts.
    """

    def __init__(self, engine: RolloutEngine, model: LoadedModel, file: Path) -> None:
        self.engine, self.model, self.file, self.version = engine, model, file, 0
        drop_cut_line(file)

    def generate(
        self,
        prompts: Prompts,
        n: int,
        sampling: Sampling,
        seed: int,
        numbers: Sequence[int] | None = None,
        on_done: Callable[[Sample], None] | None = None,
    ) -> list[list[Sample]]:
        """See RolloutEngine."""
        groups = self.engine.generate(prompts, n, sampling, seed, numbers, on_done)
        decode = self.model.encoder.decode
        rows = [
            {"prompt": decode(ids), "completions": [decode(one.tokens) for one in group]}
            for ids, group in zip(prompts, groups, strict=True)
        ]
        append(self.file, json.dumps({"iteration": self.version, "rows": rows}) + "\n")
        return groups

    def sync(self, model: LoadedModel, version: int) -> None:
        """See RolloutEngine."""
        self.engine.sync(model, version)
        self.version = version
