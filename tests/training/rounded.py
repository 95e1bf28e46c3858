"""A policy whose layers travel in bfloat16, beside one that autocast rounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefloop import distributed
from prefloop.data.batches import pack
from prefloop.generation.engine import Engine
from prefloop.generation.protocol import Sample
from prefloop.generation.sampler import Sampling
from prefloop.models.heads import answer_log_probs
from prefloop.models.model import LoadedModel
from prefloop.models.sharding import gathered, in_step, whole
from prefloop.models.weights import Storage
from prefloop.training.start import divide
from tests.models.plain import random_examples
from tests.training.small import config, policy


def tell_rounded(world: Path, output: Path, name: str) -> None:
    """Writes NAME-RANK.json: the types in which a layer's query projection and norm come to compute
    (`types`), whether the divided model's log-probs (`log_probs`) and all gradients (`gradients`)
    are the whole one's to the bit, and how far those of two micro-batches are off, of each
    weight's largest (`two`); whether both sample the same answers (`samples`).
    """
    storage = Storage("bfloat16")
    alone, divided = (policy(world, storage=storage, trained=True) for _ in range(2))
    alone.lean = None  # Transformers' forward pass, as the divided one takes it
    distributed.start(alone.device)
    divide(config("sft", world, output / f"{name}-run", dtype="bfloat16"), [divided])
    types: list[str] = []
    layer: Any = divided.base.layers[0]  # type: ignore[index]
    hooks = [
        part.register_forward_hook(lambda part, args, output: types.append(str(part.weight.dtype)))
        for part in (layer.self_attn.q_proj, layer.input_layernorm)
    ]
    found: dict[str, Any] = {}
    (left, ours), (right, theirs) = (computed(model, 1) for model in (alone, divided))
    found["log_probs"] = torch.equal(left, right)
    found["gradients"] = all(torch.equal(ours[key], theirs[key]) for key in ours)
    found["types"] = sorted(set(types))
    (_, ours), (_, theirs) = (computed(model, 2) for model in (alone, divided))
    found["two"] = max(float((ours[k] - theirs[k]).abs().max() / ours[k].abs().max()) for k in ours)
    for hook in hooks:  # a layer with one is not packed
        hook.remove()
    found["samples"] = sampled(alone) == sampled(divided)
    (output / f"{name}-{distributed.rank()}.json").write_text(json.dumps(found))
    distributed.barrier()


def computed(model: LoadedModel, passes: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of this rank's examples in so many micro-batches, and gradients of all ranks'."""
    model.module.zero_grad()
    mine = random_examples()[distributed.rank() :: distributed.world()]
    parts = [mine[number::passes] for number in range(passes)]
    found = []
    for part in parts:
        with in_step([model]):
            found.append(answer_log_probs(model, pack(part)))
        weights = torch.linspace(-1, 1, len(found[-1]))
        (found[-1] * weights).sum().backward()  # type: ignore[no-untyped-call]
    distributed.sum_gradients(model.trainable())
    named = model.named_trainable()
    return torch.cat(found).detach(), {
        name: whole(p.grad) for name, p in named.items() if p.grad is not None
    }


def sampled(model: LoadedModel) -> list[list[Sample]]:
    """Two answers to each example's prompt; a divided model samples from whole bfloat16 matrices
    and float32 embeddings and norms.
    """
    with gathered(model, rounded=True) as there:
        kinds = {name: str(p.dtype) for name, p in there.module.named_parameters()}
    if model.sharded is not None:
        narrow = [name for name, kind in kinds.items() if kind == "torch.bfloat16"]
        assert narrow and all("proj" in name or "lm_head" in name for name in narrow), kinds
    prompts = [example.prompt for example in random_examples()]
    return Engine(model).generate(prompts, 2, Sampling(max_new_tokens=8), seed=0)
