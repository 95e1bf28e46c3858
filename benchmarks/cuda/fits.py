"""Runs under a card's memory: their peaks beside what was planned for them."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from benchmarks.cuda import models
from benchmarks.cuda.meter import Watch, capped, settle
from benchmarks.cuda.scale import Line, Scale
from benchmarks.cuda.train import FreshReference
from prefloop.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig, TrainingConfig
from prefloop.config.checks import validate
from prefloop.models.model import LoadedModel
from prefloop.recipes.plan_table import COMMANDS, work_of
from prefloop.runs import Run
from prefloop.training import optim, ppo
from prefloop.training.full_rows import full_row
from prefloop.training.method import Method
from prefloop.training.planned_roles import roles_of
from prefloop.training.planning import Plan, full_plan, in_words
from prefloop.training.preference import Preference
from prefloop.training.reward import Reward
from prefloop.training.sft import SFT
from prefloop.training.start import model_options
from prefloop.training.step import optimizer_step

STEPS = 2
"""Optimiser steps; PPO takes as many iterations. The second has the optimiser's moments."""
TOLD = ("loss", "grad_norm", "objective/scores", "objective/kl", "val/sampler_gap", "length_mean")


class Built(NamedTuple):
    """A method, and all models that the run holds."""

    method: Method[Any]
    models: list[LoadedModel]


def fitting(
    part: str, command: str, shape: str, scale: Scale, device: torch.device
) -> Iterator[Line]:
    """A run of a command on rows of full length, under the cap; then its plan."""
    with TemporaryDirectory() as name:
        config = settings(part, command, shape, scale, Path(name))
        with capped(device, scale.cap), Watch(device) as watch:
            start = time.perf_counter()
            built = BUILD[command](config, device)
            settle(device)
            loading = time.perf_counter() - start
            watch.begin(built.models)
            steps, found = _steps(config, built.method)
        yield run_line(watch, loading, steps, found, scale)
        planned = full_plan(work_of(config), config, roles_of(config, device), device)
        yield plan_line(planned, watch.steps)


def settings(part: str, command: str, shape: str, scale: Scale, folder: Path) -> Any:
    """Of the run, its base and rows written; PPO's reward model is an adapter on that base."""
    base = folder / "base"
    models.write_base(base, scale.shapes[shape])
    own: dict[str, Any] = {"model": str(base), "data": "rows", "output": folder / "run"}
    own |= {"dtype": "bfloat16", "lr": 1e-5, **scale.fits[part]}
    if command == "ppo":
        models.write_reward_adapter(base, folder / "scorer", own["lora_rank"])
        own |= {"reward_model": str(folder / "scorer"), "data": str(folder / "prompts.jsonl")}
        draw, length = random.Random(0), own["max_length"] - own["max_new_tokens"]
        count = own["batch_size"] * own["num_minibatches"] * STEPS
        rows = [{"prompt": models.random_text(draw, length)} for _ in range(count)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "prompts.jsonl").write_text(lines, encoding="utf-8")
    else:
        own["max_steps"] = STEPS
    config: TrainingConfig = COMMANDS[command](**own)
    validate(config)
    return config


def _steps(config: TrainingConfig, method: Method[Any]) -> tuple[list[float], dict[str, float]]:
    """Seconds of each step, PPO's with the sampling before it, and the last one's numbers."""
    parameters = {name: model.trainable() for name, model in method.trained.items()}
    optimizer = optim.build_optimizer(parameters, config, method.learning_rates)
    device = next(iter(method.trained.values())).device
    seconds: list[float] = []
    found: dict[str, float] = {}
    start = time.perf_counter()
    for number, step in enumerate(method.steps(0)):
        outcome = optimizer_step(method, step.batches, parameters, optimizer, config, number=number)
        settle(device)
        found |= {**step.metrics, **outcome.losses, **outcome.norms}
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    assert all(map(math.isfinite, found.values())), found
    return seconds, found


def run_line(
    watch: Watch, loading: float, steps: list[float], found: dict[str, float], scale: Scale
) -> Line:
    """What it held and took."""
    result = f"peak {in_words(watch.steps)}, while loading {in_words(watch.load)}"
    if watch.reserved:
        result += f"; with gaps {in_words(watch.reserved)} of {in_words(scale.cap)} allowed"
    result += f"; {loading:.0f} s to load, {sum(steps):.0f} s for {len(steps)} steps; "
    result += ", ".join(f"{name} {found[name]:.3g}" for name in TOLD if name in found)
    return {"what": "run", "result": result, "peak": watch.steps, "load": watch.load,
            "reserved": watch.reserved, "loading": loading, "steps": steps,
            "metrics": found}  # fmt: skip


def plan_line(planned: Plan, peak: int) -> Line:
    """The plan beside the peak, and by part as `prefloop check` has it."""
    off = planned.peak / peak - 1
    parts = {f"{part.model}, {part.kind}": size for part, size in planned.parts.items()}
    result = f"off by {off:+.1%}: {planned.line()}"
    return {"what": "plan", "result": result, "planned": planned.peak, "off": off, "parts": parts}


def _supervised(config: TrainingConfig, device: torch.device) -> Built:
    """SFT, a reward model or DPO, on rows of full length."""
    scorer = isinstance(config, RewardConfig)
    model = models.load_policy(config.model, device, scorer=scorer, **model_options(config))
    draw, vocabulary = random.Random(0), model.hf.config.vocab_size
    whole = full_row(config)
    lengths = len(whole.prompt), tuple(map(len, whole.answers))
    rows = [
        models.random_row(draw, *lengths, vocabulary, index)
        for index in range(config.batch_size * STEPS)
    ]
    method: Any
    if isinstance(config, RewardConfig):
        method = Reward(config, model, rows, [])
    elif isinstance(config, DPOConfig):
        method = Preference(config, model, rows, [], Path(), FreshReference)
    else:
        assert isinstance(config, SFTConfig)
        method = SFT(config, model, rows, [])
    return Built(method, [model])


def _ppo(config: PPOConfig, device: torch.device) -> Built:
    """Policy, critic and reward model on one base."""
    run = Run.open(config, "ppo")
    method = ppo.build(config, device, run, load=models.load_policy)
    assert method.critic is not None
    assert method.critic.module is method.policy.module
    return Built(method, [method.policy])


BUILD: dict[str, Callable[[Any, torch.device], Built]] = {
    "sft": _supervised,
    "reward": _supervised,
    "dpo": _supervised,
    "ppo": _ppo,
}
