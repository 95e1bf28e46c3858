"""Transformers' side of generation: `generate` on one left-padded batch, or `generate_batch`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
)

from benchmarks.meter import serve
from benchmarks.work import WORKS, read_texts, stop_ids

PAGE, MOST_TOKENS = 32, 1024  # tokens of a block of the cache, and of one forward pass
Turn = Callable[[], dict[str, Any]]


def main(name: str, path: str, models: str, dtype: str, form: str) -> None:
    """Load, then take turns; the weights are in the dtype themselves, which is its fastest way."""
    work, policy = WORKS[name], f"{models}/policy"
    prompts = [row["prompt"] for row in read_texts(path)]
    tokenizer: Any = AutoTokenizer.from_pretrained(policy, padding_side="left")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = "<|endoftext|>"
    model: Any = AutoModelForCausalLM.from_pretrained(policy, dtype=getattr(torch, dtype)).eval()
    stops = stop_ids(work, tokenizer)
    model.generation_config.eos_token_id = None  # ours are below
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=work.answer[1],
        num_return_sequences=work.answers,
        eos_token_id=stops or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    serve((padded if form == "generate" else continuous)(model, tokenizer, prompts, config))


def padded(model: Any, tokenizer: Any, prompts: list[str], config: GenerationConfig) -> Turn:
    """`generate`: ended answers run on as padding until the last one ends."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    width = batch["input_ids"].shape[1]

    @torch.no_grad()
    def turn() -> dict[str, Any]:
        output = model.generate(**batch, generation_config=config)[:, width:]
        if config.eos_token_id is None:
            return {"tokens": output.numel()}
        return {"tokens": int((output != tokenizer.pad_token_id).sum())}

    return turn


def continuous(model: Any, tokenizer: Any, prompts: list[str], config: GenerationConfig) -> Turn:
    """`generate_batch`: continuous batching over a paged cache with room for all answers.

    Left to itself it takes 90 % of the machine's memory for the cache, in use or not.
    """
    inputs = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    longest = max(map(len, inputs)) + config.max_new_tokens
    blocks = (-(-longest // PAGE) + 1) * len(inputs) * config.num_return_sequences
    room = ContinuousBatchingConfig(page_size=PAGE, num_blocks=blocks, max_batch_tokens=MOST_TOKENS)

    def turn() -> dict[str, Any]:
        outputs = model.generate_batch(
            inputs, generation_config=config, continuous_batching_config=room
        )
        found = [output.generated_tokens for output in outputs.values()]
        assert len(found) == len(inputs) * config.num_return_sequences, "requests failed"
        return {"tokens": sum(map(len, found))}

    return turn


if __name__ == "__main__":
    main(*sys.argv[1:])
