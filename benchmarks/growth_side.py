"""A side of prefloop alone, of any size: `python -m benchmarks.growth_side MODEL DTYPE POINT`.

POINT is JSON of rows, answers, prompt and answer lengths in tokens. A training turn is a SimPO step
on random tokens over all pairs, which costs what a DPO step with the reference on disk costs;
with `decode`, a turn writes the answers instead.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.meter import serve
from prefloop.config import DPOConfig
from prefloop.data.batches import pack_all
from prefloop.data.tokenize import Example
from prefloop.generation.engine import Engine
from prefloop.generation.sampler import Sampling
from prefloop.models.load import load_policy
from prefloop.models.model import LoadedModel
from prefloop.models.weights import Storage
from prefloop.training import optim
from prefloop.training.preference import Preference
from prefloop.training.step import optimizer_step

CPU = torch.device("cpu")


def main(model: str, dtype: str, point: str) -> None:
    """Load, then take turns."""
    shape = json.loads(point)
    serve((decode if shape.get("decode") else train)(model, dtype, shape))


class Draw:
    """Random token ids of a model's vocabulary."""

    def __init__(self, model: LoadedModel) -> None:
        self.size = model.hf.config.get_text_config().vocab_size
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, count: int) -> tuple[int, ...]:
        return tuple(torch.randint(self.size, (count,), generator=self.generator).tolist())


def train(path: str, dtype: Any, shape: dict[str, int]) -> Callable[[], dict[str, Any]]:
    """An optimiser step."""
    model, k = load_policy(path, CPU, Storage(dtype), trained=True), shape["answers"]
    draw = Draw(model)
    examples = [
        Example(
            draw(shape["prompt"]),
            tuple(draw(shape["answer"]) for _ in range(k)),
            ((True,) * shape["answer"],) * k,
            tiers=tuple((i,) for i in range(k)),
        )
        for _ in range(shape["rows"])
    ]
    config = DPOConfig(model=path, data="", output=Path("unused"), loss="simpo", dtype=dtype)
    method = Preference(config, model, examples, [], Path("unused"))
    batches = pack_all(examples, config.micro_batch_tokens)
    parameters = {"policy": model.trainable()}
    optimizer = optim.build_optimizer(parameters, config, {})

    def turn() -> dict[str, Any]:
        optimizer_step(method, batches, parameters, optimizer, config)
        return {"tokens": sum(b.tokens for b in batches)}

    return turn


def decode(path: str, dtype: Any, shape: dict[str, int]) -> Callable[[], dict[str, Any]]:
    """Sampled answers of full length."""
    model = load_policy(path, CPU, Storage(dtype))
    draw = Draw(model)
    prompts = [draw(shape["prompt"]) for _ in range(shape["rows"])]
    engine = Engine(model, shape["rows"] * shape["answers"])
    sampling = Sampling(max_new_tokens=shape["answer"])

    def turn() -> dict[str, Any]:
        groups = engine.generate(prompts, shape["answers"], sampling, seed=0)
        return {"tokens": sum(len(s.tokens) for group in groups for s in group)}

    return turn


if __name__ == "__main__":
    main(*sys.argv[1:])
