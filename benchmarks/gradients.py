"""How far bfloat16's gradients are from float32's, in prefloop and in the stock model.

Per method, on real text: the gradient of prefloop's path in float32 is compared with prefloop's
under autocast, and with that of Transformers' own model (sdpa, padded) under the same autocast and
the same loss. The stock path gets prefloop's float32 score head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks.prefloop_side import CPU, records
from benchmarks.sides import prepare_models, prepare_rows
from benchmarks.work import WORKS
from prefloop.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from prefloop.data.batches import TokenBatch, pack_all
from prefloop.data.tokenize import tokenize
from prefloop.generation.engine import Engine
from prefloop.models.heads import answer_log_probs, token_values
from prefloop.models.load import load_policy, load_scorer
from prefloop.models.model import LoadedModel
from prefloop.models.precision import Products
from prefloop.records import RowCounts
from prefloop.rewards.scorers import Scored
from prefloop.training import ppo
from prefloop.training.preference import Preference
from prefloop.training.reward import Reward
from prefloop.training.rollout import Sampler
from prefloop.training.rows import Prompts
from prefloop.training.sft import SFT
from prefloop.training.step import gradients

METHODS = {"sft": "sft", "reward": "dpo", "dpo": "dpo", "ppo": "sft"}  # and whose rows
TOKENS = 512  # of a micro-batch
Gradient = dict[str, list[Tensor]]  # of each trained model
Loaders = tuple[Callable[[str], LoadedModel], Callable[[str], LoadedModel]]  # policy, scorer


def measure(dtype: str, threads: int) -> dict[str, Any]:
    """Means over micro-batches of cosine and norm ratio, printed for each method's models."""
    torch.set_num_threads(threads)
    models = prepare_models()
    found: dict[str, Any] = {}
    for method, work in METHODS.items():
        for name, sides in compare(method, work, prepare_rows(work), models).items():
            found[f"{method} {name}"] = sides
            told = []
            for side, parts in sides.items():
                cosine, norm = fmean(parts["cosine"]), fmean(parts["norm"])
                told.append(f"{side} 1 - cosine {1 - cosine:.2e} norm {norm:.4f}")
            lost = loses_more(sides["prefloop"]["cosine"], sides["stock"]["cosine"])
            told.append("MORE THAN STOCK" if lost else "")
            print(f"{method} {name}:", *told, flush=True)
    return {"gradients": found}


def loses_more(ours: list[float], stock: list[float]) -> bool:
    """Whether the cosines are smaller by more than two standard errors of their differences."""
    differences = [s - o for o, s in zip(ours, stock, strict=True)]
    error: float = stdev(differences) / len(differences) ** 0.5
    return fmean(differences) > 2 * error


def compare(method: str, work: str, rows: str, models: str) -> dict[str, Any]:
    """Of each trained model and side: cosine and norm ratio of every micro-batch's gradient."""
    sides = {
        "prefloop": _method(method, work, rows, models, (policy, scorer)),
        "stock": _method(method, work, rows, models, (stock_policy, stock_scorer)),
    }
    found: dict[str, Any] = {}
    for number in range(len(sides["prefloop"][1])):
        exact = gradient(*sides["prefloop"], number, "float32")
        for side, parts in sides.items():
            for name, rough in gradient(*parts, number, "bfloat16").items():
                measured = found.setdefault(name, {}).setdefault(side, {"cosine": [], "norm": []})
                for key, value in agreement(rough, exact[name]).items():
                    measured[key].append(value)
    return found


def agreement(rough: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    """Cosine, and norm over norm."""
    pairs = list(zip(rough, exact, strict=True))
    product = sum(float((r.double() * e.double()).sum()) for r, e in pairs)
    norms = [sum(float(x.double().square().sum()) for x in side) ** 0.5 for side in (rough, exact)]
    return {"cosine": product / (norms[0] * norms[1]), "norm": norms[0] / norms[1]}


def policy(path: str) -> LoadedModel:
    """prefloop's."""
    return load_policy(path, CPU)


def scorer(path: str) -> LoadedModel:
    """prefloop's."""
    return load_scorer(path, CPU)


def stock_policy(path: str) -> LoadedModel:
    """Transformers' model as it comes, on padded batches."""
    module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return replace(load_policy(path, CPU), module=module.eval(), packed=False)


def stock_scorer(path: str) -> LoadedModel:
    """The same with a score head."""
    module = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    return replace(load_scorer(path, CPU), module=module.eval(), packed=False)


def gradient(
    trained: Any, batches: list[Any], config: Any, number: int, dtype: Products
) -> Gradient:
    """Of one micro-batch; what the loss holds fixed is float32's for every side."""
    parameters = {name: model.trainable() for name, model in trained.trained.items()}
    for model in trained.trained.values():
        model.dtype = dtype
    gradients(trained, [batches[number]], parameters, config)
    found: Gradient = {}
    for name, group in parameters.items():
        found[name] = [p.grad if p.grad is not None else torch.zeros_like(p) for p in group]
        for p in group:
            p.grad = None
    return found


def _method(
    method: str, work: str, rows: str, models: str, load: Loaders
) -> tuple[Any, list[Any], Any]:
    settings: Mapping[str, Any] = {
        "model": f"{models}/policy",
        "data": rows,
        "output": Path("unused"),
        "max_grad_norm": 0.0,
    }
    as_policy, as_scorer = load
    model = as_scorer(f"{models}/scorer") if method == "reward" else as_policy(f"{models}/policy")
    examples = tokenize(records(WORKS[work], rows), model.tokenizer, 1024, "error", RowCounts())
    batches = pack_all(examples, TOKENS)
    if method == "sft":
        sft = SFTConfig(**settings)
        return SFT(sft, model, examples, []), batches, sft
    if method == "reward":
        reward = RewardConfig(**settings)
        return Reward(reward, model, examples, []), batches, reward
    if method == "dpo":
        dpo = DPOConfig(**settings, ref_model=f"{models}/reference")
        trained = Preference(dpo, model, examples, [], Path(rows).with_suffix(".ref"))
        return trained, batches, dpo
    config = PPOConfig(**settings)
    old, critic = policy(f"{models}/reference"), as_scorer(f"{models}/scorer")
    sampler = Sampler(
        config, model, critic, None, lambda *_: Scored([], {}), frozenset(), Engine(model)
    )
    nothing = Prompts((), ())
    items = rollouts(batches, old, scorer(f"{models}/scorer"))
    return ppo.PPO(config, sampler, nothing, [], nothing, []), items, config


@torch.no_grad()
def rollouts(
    batches: list[TokenBatch], old: LoadedModel, critic: LoadedModel
) -> list[ppo.RolloutBatch]:
    """The rows' answers as if `old` had sampled them, with normal advantages and value errors."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for batch in batches:
        shape = batch.target_ids.shape
        advantages, errors = torch.randn((2, *shape), generator=generator)
        values = token_values(critic, batch)
        log_probs = answer_log_probs(old, batch)
        items.append(ppo.RolloutBatch(batch, log_probs, advantages, values, values + errors))
    return items
