"""What a base in 4 bits costs in learning: DPO, a reward model and PPO, LoRA on SmolLM2-135M.

The rows are those of `benchmarks.optimizers`: sentences of film reviews, rated by people. Each
method runs on a base in the type of the products and in NF4, with the same rows and adapters at the
start; PPO has a critic, and for its reward the adapter that the reward model's run wrote.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.optimizers import write_rows
from prefloop import commands
from prefloop.config import DPOConfig, PPOConfig, RewardConfig
from prefloop.config.ranges import DType, Weights
from prefloop.provenance import cpu_seconds
from prefloop.recipes.fetch import fetch_model
from prefloop.runs import Run

SEEDS = (0, 1, 2)
LORA: dict[str, Any] = {"lora_rank": 16, "lora_alpha": 32.0}
STEPS, ITERATIONS = 24, 12
LAST = 3  # iterations at the end of PPO whose scores are its result
Found = dict[str, dict[str, list[float]]]  # of each number and form, by seed


def measure(dtype: str, threads: int) -> dict[str, Any]:
    """Held-out margins and accuracies, and PPO's scores, of both forms: printed as a table."""
    torch.set_num_threads(threads)
    source = str(fetch_model("smollm2-135m-instruct"))
    found: Found = {}
    products: DType = "float32" if dtype == "float32" else "bfloat16"
    kept: tuple[Weights, ...] = (products, "nf4")
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder))
        write_prompts(Path(folder))
        for seed in SEEDS:
            for weights in kept:
                before = cpu_seconds()
                numbers = learned(source, Path(folder), weights, products, seed)
                for name, value in numbers.items():
                    found.setdefault(name, {}).setdefault(weights, []).append(value)
                told = ", ".join(f"{name} {value:.4f}" for name, value in numbers.items())
                seconds = cpu_seconds() - before
                print(f"{weights}, seed {seed}: {told}; {seconds:.0f} CPU seconds", flush=True)
    print(*table(found, kept), sep="\n")
    return {"learned": found}


def write_prompts(folder: Path) -> None:
    """prompts.jsonl: the first words of the sentences that SFT's rows begin with."""
    lines = (folder / "sft.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.dumps({"prompt": json.loads(line)["prompt"]}) + "\n" for line in lines]
    (folder / "prompts.jsonl").write_text("".join(rows), encoding="utf-8")


def learned(
    source: str, folder: Path, weights: Weights, dtype: DType, seed: int
) -> dict[str, float]:
    """The numbers of one seed's three runs."""
    output = Path(tempfile.mkdtemp(dir=folder))
    pairs: dict[str, Any] = {
        "model": source,
        "data": str(folder / "dpo.jsonl"),
        "eval_data": str(folder / "dpo-held-out.jsonl"),
        "eval_every": STEPS,
        "max_steps": STEPS,
        "epochs": 9.0,
        "batch_size": 8,
        "weights": weights,
        "seed": seed,
        "lr": 1e-4,
        "dtype": dtype,
        "output": output / "dpo",
    }
    dpo = commands.dpo(DPOConfig(**pairs | LORA))
    rm = commands.reward(RewardConfig(**pairs | LORA | {"output": output / "reward"}))
    ppo = commands.ppo(
        PPOConfig(
            model=source,
            data=str(folder / "prompts.jsonl"),
            output=output / "ppo",
            reward_model=str(output / "reward"),
            weights=weights,
            seed=seed,
            max_steps=ITERATIONS,
            ppo_epochs=1,
            epochs=99.0,
            batch_size=32,
            max_new_tokens=16,
            lr=2e-4,
            kl_coef=0.05,
            critic_warmup=0,
            dtype=dtype,
            **LORA,
        )
    )
    held_out = [metrics(run)[-1] for run in (dpo, rm)]
    scores = [row["objective/scores"] for row in metrics(ppo) if "objective/scores" in row]
    return {
        "DPO, held-out margin": held_out[0]["eval/rewards/margins"],
        "DPO, held-out loss": held_out[0]["eval/loss"],
        "reward model, held-out accuracy": held_out[1]["eval/accuracy"],
        "reward model, held-out loss": held_out[1]["eval/loss"],
        "PPO, rise of the score": fmean(scores[-LAST:]) - scores[0],
    }


def metrics(run: Run) -> list[dict[str, Any]]:
    """The lines that a run wrote."""
    lines = (run.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def table(found: Found, kept: Sequence[str]) -> list[str]:
    """Markdown: a line a number, with the ratio of the means."""
    lines = ["| number | " + " | ".join(kept) + " | ratio |", "|---|---|---|---|"]
    for name, forms in found.items():
        values = [" · ".join(f"{x:.3f}" for x in forms[form]) for form in kept]
        means = [fmean(forms[form]) for form in kept]
        told = [f"{each} (mean {mean:.3f})" for each, mean in zip(values, means, strict=True)]
        lines.append(f"| {name} | {told[0]} | {told[1]} | {means[1] / means[0]:.2f} |")
    return lines
