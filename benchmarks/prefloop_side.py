"""prefloop's side: `python -m benchmarks.prefloop_side WORK ROWS MODELS DTYPE FORM`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ceilings import model_flops, weight_bytes
from benchmarks.meter import serve
from benchmarks.work import LORA_ALPHA, LORA_RANK, PPO_EPOCHS, WORKS, Work, read_texts, stop_ids
from prefloop.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from prefloop.data.batches import pack, pack_all
from prefloop.data.tokenize import Example, encode_prompt, tokenize
from prefloop.generation.engine import Engine
from prefloop.generation.sampler import Sampling
from prefloop.models.heads import answer_log_probs, sequence_log_probs
from prefloop.models.load import load_policy, load_scorer
from prefloop.models.model import LoadedModel
from prefloop.models.weights import Storage
from prefloop.records import Demonstration, Ranking, RowCounts
from prefloop.runs import Run
from prefloop.training import optim, ppo
from prefloop.training.preference import Preference
from prefloop.training.reward import Reward
from prefloop.training.sft import SFT
from prefloop.training.step import optimizer_step

CPU = torch.device("cpu")
Turn = Callable[[], dict[str, Any]]


def main(name: str, path: str, models: str, dtype: str, form: str) -> None:
    """Load, then take turns."""
    work = WORKS[name]
    settings: dict[str, Any] = {
        "model": f"{models}/policy", "data": path, "output": Path(tempfile.mkdtemp()) / "run",
        "lr": 1e-6, "dtype": dtype, "gradient_checkpointing": form == "checkpointing",
        "micro_batch_tokens": 2048 if form == "small" else 8192,
    }  # fmt: skip
    if work.lora:
        settings |= {"lora_rank": LORA_RANK, "lora_alpha": LORA_ALPHA}
    if work.kind == "generate":
        serve(generation(work, path, settings))
    elif work.kind == "ppo":
        serve(iteration(work, f"{models}/scorer", f"{models}/reference", settings))
    else:
        serve(step(work, path, f"{models}/reference", settings, form))


def records(work: Work, path: str) -> list[Any]:
    """Rows as demonstrations or as rankings whose answers stand best first."""
    if work.answers == 1:
        return [Demonstration(r["prompt"], r["completions"][0]) for r in read_texts(path)]
    tiers = tuple((i,) for i in range(work.answers))
    return [Ranking(r["prompt"], tuple(r["completions"]), tiers) for r in read_texts(path)]


def step(work: Work, path: str, reference: str, settings: dict[str, Any], form: str) -> Turn:
    """One optimiser step over all rows."""
    load = load_scorer if work.kind == "reward" else load_policy
    kept = ("lora_rank", "lora_alpha", "gradient_checkpointing")
    options = {k: v for k, v in settings.items() if k in kept}
    storage = Storage(settings["dtype"])
    model = load(settings["model"], CPU, storage, trained=True, **options)
    examples = tokenize(records(work, path), model.tokenizer, 1024, "error", RowCounts())
    batches: list[Any] = pack_all(examples, settings["micro_batch_tokens"])
    flops = sum(forward_and_backward(model, batch.examples) for batch in batches)
    fixed: LoadedModel | None = None
    method: Any
    if work.kind == "sft":
        method = SFT(SFTConfig(**settings), model, examples, [])
    elif work.kind == "reward":
        method = Reward(RewardConfig(**settings, normalize="pair"), model, examples, [])
    else:
        config = DPOConfig(**settings, ref_model=reference)
        cache = Path(path).with_suffix(f".{config.dtype}.ref")
        method = Preference(config, model, examples, [], cache)
        if form == "first":  # every row is new: the reference reads it, too
            fixed = load_policy(reference, CPU, storage)
            flops += forward(fixed, examples)
    parameters = {key: part.trainable() for key, part in method.trained.items()}
    optimizer = optim.build_optimizer(parameters, method.config, {})
    tokens = sum(len(e.prompt) + len(a) for e in examples for a in e.answers)

    def turn() -> dict[str, Any]:
        if fixed:
            sequence_log_probs(fixed, examples, method.config.micro_batch_tokens)
        outcome = optimizer_step(method, batches, parameters, optimizer, method.config)
        same = {"loss": outcome.losses["loss"]}
        if "logps/chosen" in outcome.metrics:
            same["logps"] = outcome.metrics["logps/chosen"]
        return {"same": same, "tokens": tokens, "flops": flops}

    return turn


def iteration(work: Work, scorer: str, reference: str, settings: dict[str, Any]) -> Turn:
    """One PPO iteration over all prompts."""
    config = PPOConfig(
        **settings,
        reward_model=scorer,
        ref_model=reference,
        batch_size=work.rows,
        ppo_epochs=PPO_EPOCHS,
        max_new_tokens=work.answer[1],
        epochs=10_000,
        critic_warmup=0,  # every turn is an iteration of both
    )
    method = ppo.build(config, CPU, Run.open(config, "ppo"))
    stops = frozenset(stop_ids(work, method.policy.tokenizer))
    method.sampler = replace(method.sampler, stop_token_ids=stops)
    parameters = {key: part.trainable() for key, part in method.trained.items()}
    optimizer = optim.build_optimizer(parameters, config, {})
    steps = method.steps(0)
    assert method.critic and method.sampler.reference
    policy, critic, fixed = method.policy, method.critic, method.sampler.reference

    def turn() -> dict[str, Any]:
        metrics: dict[str, float] = {}
        for _ in range(PPO_EPOCHS):
            part = next(steps)
            metrics |= part.metrics
            optimizer_step(method, part.batches, parameters, optimizer, config)
        assert method.rollouts
        examples = method.rollouts.examples
        flops = 2 * forward(policy, examples)  # sampling, and log-probs as the trainer sees them
        flops += forward(fixed, examples) + 2 * forward(critic, examples)  # critic, reward model
        flops += PPO_EPOCHS * forward_and_backward(policy, examples)
        flops += PPO_EPOCHS * forward_and_backward(critic, examples)
        tokens = int(method.rollouts.mask.sum())
        return {
            "same": {} if work.stops else {"tokens": tokens},  # drawn lengths differ
            "alike": {"score": metrics["objective/scores"], "kl": metrics["objective/kl"]},
            "tokens": tokens,
            "flops": flops,
        }

    return turn


def generation(work: Work, path: str, settings: dict[str, Any]) -> Turn:
    """Sampled answers to all prompts."""
    model = load_policy(settings["model"], CPU, Storage(settings["dtype"]))
    prompts = [encode_prompt(model.tokenizer, row["prompt"]) for row in read_texts(path)]
    engine = Engine(model, 64)
    sampling = Sampling(
        max_new_tokens=work.answer[1],
        temperature=1.0,
        stop_token_ids=frozenset(stop_ids(work, model.tokenizer)),
    )
    first = tuple(prompts[0])
    text = Example(first[:1], (first[1:],), ((True,) * len(first[1:]),))
    with torch.no_grad():
        log_probs = answer_log_probs(model, pack([text]))
    facts: dict[str, Any] = {"same": {"prompt_log_prob": float(log_probs.mean())}}
    if not work.stops and work.rows * work.answers <= engine.max_concurrent:
        bytes_read = weight_bytes(model, getattr(torch, settings["dtype"]))
        facts |= {"steps": work.answer[1], "step_bytes": bytes_read}

    def turn() -> dict[str, Any]:
        groups = engine.generate(prompts, work.answers, sampling, seed=0)
        return {"tokens": sum(len(s.tokens) for group in groups for s in group)} | facts

    return turn


def forward(model: LoadedModel, examples: Sequence[Example]) -> float:
    """FLOPs of log-probs or scores of these rows, packed."""
    return model_flops(model, *_stream(examples), trains=False)


def forward_and_backward(model: LoadedModel, examples: Sequence[Example]) -> float:
    """FLOPs of their gradients."""
    return model_flops(model, *_stream(examples), trains=True)


def _stream(examples: Sequence[Example]) -> tuple[Tensor, int]:
    batch = pack(examples)
    return batch.position_ids, batch.target_ids.numel()


if __name__ == "__main__":
    main(*sys.argv[1:])
