"""prefloop's side: `python -m benchmarks.prefloop_side WORK ROWS POLICY REFERENCE DTYPE FORM`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.meter import serve
from benchmarks.work import STOPS, WORKS
from prefloop.config import DPOConfig, RewardConfig, SFTConfig
from prefloop.data.batches import to_batches
from prefloop.data.tokenize import encode_prompt, stop_token_ids, tokenize
from prefloop.files import read_rows
from prefloop.generation.engine import Engine
from prefloop.generation.sampler import Sampling
from prefloop.models.load import LoadedModel, load_policy, load_scorer
from prefloop.records import Demonstration, Ranking, RowCounts
from prefloop.training import loop, optim
from prefloop.training.preference import MicroBatch, Preference
from prefloop.training.reference import sequence_log_probs
from prefloop.training.reward import Reward
from prefloop.training.sft import SFT

CPU = torch.device("cpu")
LR = 1e-6


def main(name: str, path: str, policy: str, reference: str, dtype: str, form: str) -> None:
    """Load, then take turns."""
    work = WORKS[name]
    rows = [row for _, row in read_rows(path)]
    settings: dict[str, Any] = {
        "model": policy, "data": path, "output": Path("unused"), "lr": LR, "dtype": dtype,
    }  # fmt: skip
    if work.kind == "generate":
        serve(generation(load_policy(policy, CPU), rows, name, dtype))
    records: list[Any] = [
        Demonstration(row["prompt"], row["completions"][0])
        if work.kind == "sft"
        else Ranking(
            row["prompt"],
            tuple(row["completions"]),
            tuple((i,) for i in range(work.answers)),
        )
        for row in rows
    ]
    scorer = work.kind == "reward"
    model = load_scorer(policy, CPU) if scorer else load_policy(policy, CPU)
    examples = tokenize(records, model.tokenizer, 1024, "error", RowCounts())
    batches: list[Any] = to_batches(examples, 8192, CPU)
    fixed: LoadedModel | None = None
    method: Any
    if work.kind == "sft":
        method = SFT(SFTConfig(**settings), model, examples, [])
    elif work.kind == "reward":
        method = Reward(RewardConfig(**settings, normalize="pair"), model, examples, [])
    else:
        config = DPOConfig(**settings, ref_model=reference)
        method = Preference(config, model, examples, [], Path(path).with_suffix(f".{dtype}.ref"))
        batches = [MicroBatch(batch, 0.0) for batch in batches]
        if form == "first":  # every row is new: the reference reads it, too
            fixed = load_policy(reference, CPU)
    parameters = {key: part.trainable() for key, part in method.trained.items()}
    optimizer = optim.build_optimizer(parameters, method.config, {})
    tokens = sum(len(e.prompt) + len(a) for e in examples for a in e.answers)

    def step() -> dict[str, Any]:
        if fixed:
            sequence_log_probs(method.config, fixed, examples)
        optimizer.zero_grad()
        values, _, _ = loop.gradients(method, batches, parameters, method.config)
        optimizer.step()
        return {"loss": values["loss"], "tokens": tokens}

    serve(step)


def generation(
    model: LoadedModel, rows: list[dict[str, Any]], name: str, dtype: str
) -> Callable[[], dict[str, Any]]:
    """Sampled answers to all prompts."""
    work = WORKS[name]
    prompts = [encode_prompt(model.tokenizer, row["prompt"]) for row in rows]
    engine = Engine(model, 64, "bfloat16" if dtype == "bfloat16" else "float32")
    sampling = Sampling(
        max_new_tokens=work.answer[1],
        temperature=1.0,
        stop_token_ids=stop_token_ids(model.tokenizer)
        | {model.tokenizer(stop)["input_ids"][0] for stop in STOPS if work.answers == 1},
    )

    def turn() -> dict[str, Any]:
        groups = engine.generate(prompts, work.answers, sampling, seed=0)
        return {"tokens": sum(len(sample.tokens) for group in groups for sample in group)}

    return turn


if __name__ == "__main__":
    main(*sys.argv[1:])
