"""How far log-probs in bfloat16 are from float32's: while sampling, in training, and stock.

Answers sampled by the engine in bfloat16, their tokens' log-probs as the engine gave them, as the
trainer computes them, and as Transformers' own model does with its weights in bfloat16.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.prefloop_side import CPU
from benchmarks.sides import prepare_models, prepare_rows
from benchmarks.work import WORKS, read_texts, stop_ids
from prefloop.data.batches import to_batches
from prefloop.data.tokenize import Example, encode_prompt
from prefloop.generation.engine import Engine
from prefloop.generation.sampler import Sampling
from prefloop.models.heads import answer_log_probs
from prefloop.models.load import load_policy
from prefloop.models.model import LoadedModel
from prefloop.models.precision import Products

WORK = WORKS["generate"]
TOKENS = 2048  # of a micro-batch


@torch.no_grad()
def measure(_: str, threads: int) -> dict[str, Any]:
    """Root mean square of the differences of each side, in nats a token, printed."""
    torch.set_num_threads(threads)
    path = f"{prepare_models()}/policy"
    model = load_policy(path, CPU)
    texts = read_texts(prepare_rows("generate"))
    prompts = [encode_prompt(model.tokenizer, row["prompt"]) for row in texts]
    stops = frozenset(stop_ids(WORK, model.tokenizer))
    sampling = Sampling(WORK.answer[1], stop_token_ids=stops)
    groups = Engine(replace(model, dtype="bfloat16")).generate(prompts, 1, sampling, seed=0)
    examples = [
        Example(tuple(prompt), (sample.tokens,), ((True,) * len(sample.tokens),))
        for prompt, (sample,) in zip(prompts, groups, strict=True)
    ]
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    sides = {
        "sampled": torch.tensor([x for (sample,) in groups for x in sample.log_probs]),
        "trained": log_probs(model, examples, "bfloat16"),
        "stock": log_probs(replace(model, module=stock, packed=False), examples, "float32"),
    }
    exact = log_probs(model, examples, "float32")
    found = {name: float((side - exact).square().mean().sqrt()) for name, side in sides.items()}
    print(f"{len(exact)} tokens:", *(f"{name} {rms:.4f}" for name, rms in found.items()))
    return {"log_probs": found}


def log_probs(model: LoadedModel, examples: list[Example], dtype: Products) -> Tensor:
    """Of all answers' tokens, float32 [N]; weights in bfloat16 need no autocast."""
    model = replace(model, dtype=dtype)
    return torch.cat([answer_log_probs(model, b) for b in to_batches(examples, TOKENS, CPU)])
