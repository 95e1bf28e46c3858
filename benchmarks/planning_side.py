"""A run to be measured: `python -m benchmarks.planning_side SETTINGS MODEL`; prints JSON.

SETTINGS is JSON of a training command's settings with `command`; MODEL is a folder with a policy,
and one of a scorer in `MODEL-scorer`. Two steps of two micro-batches each are taken on rows of full
length; PPO's have their rollouts before them. Two peaks are told, of the steps alone: of all live
tensors, and of the process's resident memory above what it had before it loaded a model (on a GPU:
of allocated memory). A tiny run comes first, so that libraries are there already.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from prefloop import provenance
from prefloop.config import PPOConfig, TrainingConfig
from prefloop.config.resolve import build
from prefloop.data.tokenize import Example
from prefloop.generation.engine import in_process
from prefloop.models.load import load_policy, load_scorer, pick_device
from prefloop.models.model import LoadedModel
from prefloop.models.shared import reference_of
from prefloop.models.weights import frozen_copy, kept, storage_of
from prefloop.recipes.plan_table import COMMANDS, work_of
from prefloop.records import Prompt
from prefloop.rewards.scorers import model_scorer
from prefloop.training import optim
from prefloop.training.bare_models import weights_of
from prefloop.training.full_rows import full_row, full_rows
from prefloop.training.method import Method
from prefloop.training.planned_roles import roles_of
from prefloop.training.planning import full_plan
from prefloop.training.ppo import PPO
from prefloop.training.roles import load_beside
from prefloop.training.rollout import Sampler
from prefloop.training.rows import Prompts
from prefloop.training.start import model_options
from prefloop.training.step import optimizer_step
from prefloop.training.tracing import WEIGHTS, Ledger, Part

STEPS = 2
Built = tuple[Method[Any], list[LoadedModel]]
"""A method, and all models that the run holds."""


def main(text: str, model: str, small: str) -> None:
    """Warm up, plan, run, compare."""
    settings = json.loads(text)
    config: Any = build(COMMANDS[settings.pop("command")], settings, "SETTINGS")
    device = pick_device(config.device)
    measure(config, small, device)
    gc.collect()
    plan = full_plan(work_of(config), config, roles_of(_at(config, model), device), device)
    tensors, memory = measure(config, model, device)
    found = {
        "planned": plan.peak,
        "when": plan.when,
        "parts": {f"{part.model}, {part.kind}": size for part, size in plan.parts.items()},
        "tensors": tensors,
        "memory": memory,
    }
    print(json.dumps(found))


def _at(config: TrainingConfig, model: str) -> Any:
    """The same run of another model."""
    changes: dict[str, Any] = {"model": model}
    if isinstance(config, PPOConfig):
        changes["reward_model"] = f"{model}-scorer"
    return replace(config, **changes)


def measure(config: TrainingConfig, model: str, device: torch.device) -> tuple[int, int]:
    """Bytes of live tensors, and of the process, at the steps' peak."""
    before, ledger = _now(device), Ledger()
    config = _at(config, model)
    build: Any = _ppo if isinstance(config, PPOConfig) else _supervised
    with ledger:
        method, held = build(config, device)
        for tensor in chain.from_iterable(weights_of(model.module) for model in held):
            ledger.claim(tensor, Part("", WEIGHTS))
        parameters = {name: model.trainable() for name, model in method.trained.items()}
        optimizer = optim.build_optimizer(parameters, config, method.learning_rates)
        gc.collect()
        _reset(device)
        ledger.enter_stage("steps")
        for step in method.steps(0):
            optimizer_step(method, step.batches, parameters, optimizer, config)
    return sum(ledger.peaks["steps"].values()), _peak(device) - before


def _now(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def _reset(device: torch.device) -> None:
    provenance.reset_peak_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(provenance.peak_memory_gib() * 2**30)


def _supervised(config: TrainingConfig, device: torch.device) -> Built:
    work = work_of(config)
    load = load_scorer if work.command == "reward" else load_policy
    role = "reward model" if work.command == "reward" else "policy"
    model = load(config.model, device, **model_options(config))
    method: Any = work.method(config, {role: model})
    rows = full_rows(config, config.micro_batch_tokens)
    method.examples = rows * 2 * STEPS  # a step has two micro-batches
    method.total_steps = STEPS
    return method, [model]


def _ppo(config: PPOConfig, device: torch.device) -> Built:
    """As `ppo.build`, with prompts of full length."""
    storage = storage_of(config)
    policy = load_policy(config.model, device, **model_options(config))
    reference: LoadedModel | None = reference_of(policy)
    if not config.lora_rank:
        frozen, _ = frozen_copy(policy.module, kept(storage, device, trained=False), {})
        reference = replace(policy, module=frozen)
    (reward_model,), critic = load_beside(config, policy)
    assert critic is not None
    stops = frozenset[int]()
    scorer = model_scorer(reward_model, policy, (), config, stops)
    row: Example = full_row(config)
    count = STEPS * config.batch_size
    prompts = Prompts(tuple(Prompt("", "a") for _ in range(count)), (row,) * count)
    engine = in_process(config, policy)
    sampler = Sampler(config, policy, critic, reference, scorer, stops, engine)
    held = [policy, reward_model, critic, *([reference] if reference else [])]
    return PPO(config, sampler, prompts, [], Prompts((), ()), []), held


if __name__ == "__main__":
    main(*sys.argv[1:])
