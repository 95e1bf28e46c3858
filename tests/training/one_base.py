"""PPO methods with adapters, built and stepped without a run around them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prefloop.config import PPOConfig
from prefloop.runs import Run
from prefloop.training import optim, ppo
from prefloop.training.step import optimizer_step
from tests.training.small import COMMON, CPU, SHORT

LORA: dict[str, Any] = {"lora_rank": 2, "lora_alpha": 8.0}


def built(world: Path, output: Path, **changes: Any) -> tuple[ppo.PPO, PPOConfig]:
    """A PPO method, not yet trained."""
    settings = (
        COMMON
        | SHORT
        | LORA
        | {
            "model": str(world / "model"),
            "data": str(world / "prompts.jsonl"),
            "output": output,
            "reward_model": str(world / "rm_lora"),
            "batch_size": 3,
            "ppo_epochs": 2,
            "epochs": 9.0,
            "temperature": 0.7,
        }
    )
    config = PPOConfig(**settings | changes)
    torch.manual_seed(0)
    return ppo.build(config, CPU, Run.open(config, "ppo")), config


def copied(source: ppo.PPO, target: ppo.PPO) -> None:
    """Gives a method the trained weights of another."""
    for name, model in target.trained.items():
        theirs = source.trained[name].named_trainable()
        ours = model.named_trainable()
        assert len(ours) == len(theirs)
        pairs = zip(sorted(ours), sorted(theirs), strict=True)
        with torch.no_grad():
            for mine, other in pairs:
                assert ours[mine].shape == theirs[other].shape, (mine, other)
                ours[mine].copy_(theirs[other])


def stepped(method: ppo.PPO, config: PPOConfig, count: int) -> list[dict[str, float]]:
    """Losses, metrics and gradients' norms of some steps."""
    parameters = {name: model.trainable() for name, model in method.trained.items()}
    optimizer = optim.build_optimizer(parameters, config, {})
    numbers = []
    for item, _ in zip(method.steps(0), range(count), strict=False):
        outcome = optimizer_step(method, item.batches, parameters, optimizer, config)
        numbers.append(item.metrics | outcome.losses | outcome.metrics | outcome.norms)
    return numbers


def placed(world: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with names of the world's folders as paths."""

    def path(value: Any) -> Any:
        return str(world / value) if value and (world / value).exists() else value

    return {
        name: tuple(map(path, v)) if isinstance(v, tuple) else path(v) if isinstance(v, str) else v
        for name, v in changes.items()
    }
