"""What 8-bit moments and bfloat16 weights cost in held-out loss.

SFT and DPO of SmolLM2-135M on sentences of film reviews, rated by people: SFT learns to end a
sentence, DPO to prefer the praising ones. Every form starts from the same weights, rounded to
bfloat16 once, with the same rows in the same order; products are computed in bfloat16
in all but the last.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.prefloop_side import CPU
from prefloop.config import DPOConfig, SFTConfig
from prefloop.config.ranges import DType, Weights
from prefloop.models.load import load_policy
from prefloop.models.model import LoadedModel
from prefloop.models.weights import Storage
from prefloop.provenance import cpu_seconds
from prefloop.recipes.fetch import fetch_model, fetch_movie_ratings
from prefloop.recipes.sentiment_data import clean
from prefloop.runs import Run
from prefloop.training import optim, rows
from prefloop.training.preference import Preference
from prefloop.training.sft import SFT
from prefloop.training.step import optimizer_step

SEEDS = (0, 1, 2)
STEPS, BATCH, HELD_OUT = 8, 8, 32
LEARNING_RATES = {"sft": 5e-5, "dpo": 2e-5}
FORMS: tuple[tuple[DType, Weights, str], ...] = (  # products, weights, optimizer
    ("bfloat16", "float32", "adamw"),  # what the others are compared with
    ("bfloat16", "float32", "adamw8bit"),
    ("bfloat16", "bfloat16", "adamw"),
    ("bfloat16", "bfloat16", "adamw8bit"),
    ("float32", "float32", "adamw"),  # what no rounding of weights before products would learn
)
Losses = dict[str, list[float]]  # of each form, by seed


def measure(dtype: str, threads: int) -> dict[str, Any]:
    """Held-out losses of every form, printed with their ratio to float32 weights and moments."""
    torch.set_num_threads(threads)
    source = str(fetch_model("smollm2-135m-instruct"))
    losses: dict[str, Losses] = {"sft": {}, "dpo": {}}
    start: dict[str, dict[str, float]] = {"sft": {}, "dpo": {}}
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder))
        for storage in dict.fromkeys(form[:2] for form in FORMS):
            model = load_policy(source, CPU, Storage(*storage), trained=True)
            first = first_weights(model)
            for name, of_method in losses.items():
                for *kind, optimizer in FORMS:
                    for seed in SEEDS if tuple(kind) == storage else ():
                        put_back(model, first)
                        before = cpu_seconds()
                        done = train(name, model, Path(folder), optimizer, seed)
                        form = f"{storage[1]} weights, {storage[0]} products, {optimizer}"
                        of_method.setdefault(form, []).append(done[1])
                        start[name][storage[0]] = done[0]
                        told = f"{name}, {form}, seed {seed}: held-out loss {done[0]:.4f} to "
                        seconds = cpu_seconds() - before
                        print(f"{told}{done[1]:.4f}, {seconds:.0f} CPU seconds", flush=True)
    print(*table(losses, start), sep="\n")
    return {"held_out": losses, "start": start}


def table(losses: dict[str, Losses], start: dict[str, dict[str, float]]) -> list[str]:
    """Markdown: losses by seed, and the largest difference of a seed from the first form's."""
    lines = ["| method | form | held-out loss by seed | largest difference |", "|---|---|---|---|"]
    for name, forms in losses.items():
        exact = next(iter(forms.values()))
        for form, found in forms.items():
            apart = max((abs(x / y - 1) for x, y in zip(found, exact, strict=True)), default=0.0)
            values = " · ".join(f"{value:.4f}" for value in found)
            lines.append(f"| {name} | {form} | {values} (mean {fmean(found):.4f}) | {apart:.2%} |")
        lines.append(f"| {name} | before training | {start[name]['bfloat16']:.4f} | |")
    return lines


def first_weights(model: LoadedModel) -> list[Tensor]:
    """A copy of the weights, rounded to bfloat16: what every form begins with."""
    return [p.detach().to(torch.bfloat16, copy=True) for p in model.trainable()]


def put_back(model: LoadedModel, first: list[Tensor]) -> None:
    """The weights of the start."""
    with torch.no_grad():
        for p, values in zip(model.trainable(), first, strict=True):
            p.copy_(values)


def write_rows(folder: Path) -> None:
    """sft.jsonl and dpo.jsonl, with as many held-out rows beside them."""
    draw = random.Random(0)
    rated = [s for s in fetch_movie_ratings() if 8 <= len(s.text.split()) <= 16]
    good = [clean(s.text) for s in rated if s.mean > 1.5]
    bad = [clean(s.text) for s in rated if s.mean < -1.5]
    draw.shuffle(good)
    draw.shuffle(bad)
    count = HELD_OUT + 3 * STEPS * BATCH // 2  # more than a run takes: each seed draws its own
    demonstrations, pairs = [], []
    for praise, blame in list(zip(good, bad, strict=False))[:count]:
        words = praise.split()
        demonstrations.append(
            {"prompt": " ".join(words[:4]), "completion": " " + " ".join(words[4:])}
        )
        pairs.append({"prompt": "The film:", "chosen": f" {praise}", "rejected": f" {blame}"})
    for name, made in (("sft", demonstrations), ("dpo", pairs)):
        for file, part in ((name, made[HELD_OUT:]), (f"{name}-held-out", made[:HELD_OUT])):
            text = "".join(json.dumps(row) + "\n" for row in part)
            (folder / f"{file}.jsonl").write_text(text, encoding="utf-8")


def train(
    name: str, model: LoadedModel, folder: Path, optimizer: str, seed: int
) -> tuple[float, float]:
    """Held-out loss before and after STEPS steps."""
    settings: dict[str, Any] = {
        "model": model.source,
        "data": str(folder / f"{name}.jsonl"),
        "eval_data": str(folder / f"{name}-held-out.jsonl"),
        "output": Path(tempfile.mkdtemp(dir=folder)) / "run",
        "max_steps": STEPS,
        "batch_size": BATCH,
        "optimizer": optimizer,
        "lr": LEARNING_RATES[name],
        "seed": seed,
        "micro_batch_tokens": 512,
    }
    config = SFTConfig(**settings) if name == "sft" else DPOConfig(**settings)
    run = Run.open(config, name)
    kind: rows.Kind = "demonstration" if name == "sft" else "preference"
    examples, held_out = rows.read_examples(config, kind, model, run)
    method: SFT | Preference
    if isinstance(config, SFTConfig):
        method = SFT(config, model, examples, held_out)
    else:
        kept = model.trainable()[0].dtype  # each storage has a reference of its own
        cache = folder / f"{kept}.safetensors"
        method = Preference(config, model, examples, held_out, cache)
    parameters = {"policy": model.trainable()}
    adamw = optim.build_optimizer(parameters, config, {})
    before = method.evaluate()["loss"]
    for number, step in enumerate(method.steps(0)):
        factor = optim.lr_factor(number, STEPS, config.warmup, config.lr_schedule)
        optim.set_lr(adamw, factor)
        optimizer_step(method, step.batches, parameters, adamw, config)
    return before, method.evaluate()["loss"]
