"""How long a DPO step takes and how fast answers are sampled.

    make bench        SmolLM2-135M: 8 pairs with 256-token prompts and answers of 32 to 192 tokens
    python -m benchmarks --model FOLDER [--pairs 8] [--prompt-tokens 256] [--dtype bfloat16]

Times are of this process, with the threads that torch takes; the second of two steps is told.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from prefloop.data.batches import micro_batches, pack
from prefloop.data.tokenize import Example
from prefloop.generation.engine import Engine
from prefloop.generation.sampler import Sampling
from prefloop.losses.masked import segment_sum
from prefloop.losses.preference import sigmoid_loss
from prefloop.models.heads import answer_log_probs
from prefloop.models.load import LoadedModel, load_policy, pick_device
from prefloop.recipes.fetch import fetch_model


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    asked = parser.parse_args()
    model = load_policy(
        asked.model or str(fetch_model("smollm2-135m-instruct")), pick_device("auto")
    )
    examples = _pairs(asked.pairs, asked.prompt_tokens, model.hf.config.vocab_size)
    print(f"{model.source} on {model.device}, {asked.dtype}, {torch.get_num_threads()} threads")
    _dpo(model, examples, asked.dtype)
    _sampling(model, [example.prompt for example in examples], asked.dtype)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of the process: {peak:.2f} GiB")


def _pairs(count: int, prompt_tokens: int, vocabulary: int) -> list[Example]:
    """Pairs of random tokens, the answers of every length from 32 to 192 evenly."""
    draw = torch.Generator().manual_seed(0)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocabulary, (length,), generator=draw).tolist())

    lengths = torch.linspace(32, 192, 2 * count).int().tolist()
    examples = []
    for index in range(count):
        answers = (tokens(lengths[index]), tokens(lengths[-1 - index]))
        masks = tuple((True,) * len(answer) for answer in answers)
        examples.append(Example(tokens(prompt_tokens), answers, masks, ((0,), (1,)), index=index))
    return examples


def _dpo(model: LoadedModel, examples: list[Example], dtype: str) -> None:
    """Forward and backward of the policy; the reference's log-probs count as cached."""
    batches = [pack(group).to(model.device) for group in micro_batches(examples, 8192)]
    for _ in range(2):
        began = time.perf_counter()
        for batch in batches:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                log_probs = answer_log_probs(model, batch).log_probs
            answers = segment_sum(log_probs, batch.target_answer, batch.answers)
            chosen, rejected = (answers[side] for side in batch.pairs())
            cached = [side.detach() for side in (chosen, rejected)]
            sigmoid_loss(chosen, rejected, *cached, beta=0.1).sum.backward()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    tokens = sum(batch.tokens for batch in batches)
    print(f"DPO forward and backward: {seconds:.2f} s, {tokens / seconds:,.0f} packed tokens/s")


def _sampling(model: LoadedModel, prompts: list[tuple[int, ...]], dtype: str) -> None:
    engine = Engine(model, dtype="bfloat16" if dtype == "bfloat16" else "float32")
    for _ in range(2):
        began = time.perf_counter()
        answers = engine.generate(prompts, 4, Sampling(max_new_tokens=64), seed=0)
        seconds = time.perf_counter() - began
    tokens = sum(len(sample.tokens) for row in answers for sample in row)
    print(f"sampling 4 answers to each of {len(prompts)} prompts: {tokens / seconds:,.0f} tokens/s")


if __name__ == "__main__":
    main()
