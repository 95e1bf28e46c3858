"""What `--label-margins` is worth: reward models from labellers who also say by how much.

A simulated labeller sees two sentences of film reviews with the ratings (-4..4) that one real rater
each gave them, prefers the higher, and says how much better it is by the difference of the ratings:
up to 2 slightly, up to 4 clearly, else much. All goes through a labelling store. Each seed has its
own pairs, raters and weights at the start; held-out pairs are ordered by all raters' mean. Two
models learn: SmolLM2-135M by LoRA from few pairs, and a small one with random weights from many.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from prefloop import commands
from prefloop.config import RewardConfig
from prefloop.config.labelling import LabelImportConfig
from prefloop.files import write_jsonl
from prefloop.labelling.assign import Judgement, next_assignment, submit
from prefloop.labelling.store import Store
from prefloop.labelling.store.reading import texts_of
from prefloop.recipes.fetch import RatedSentence, fetch_model, fetch_movie_ratings
from prefloop.recipes.sentiment_data import split

SEEDS = (0, 1, 2)
PROMPT = "A film review:"
Found = dict[str, dict[str, list[float]]]  # of each form and number, by seed


@dataclass(frozen=True)
class Learner:
    """A model, its settings, whose sentences it learns from, and how many pairs."""

    name: str
    splits: tuple[str, ...]  # of recipes.sentiment_data
    pairs: int
    held_out: int
    settings: dict[str, Any]


FEW = ("sft", "preference")
LEARNERS = (
    Learner("SmolLM2-135M", FEW, 400, 400, {"lr": 2e-4, "lora_rank": 16, "lora_alpha": 32.0}),
    Learner("small", ("gold", *FEW), 2500, 1500, {"lr": 1e-3}),
)


def measure(dtype: str, threads: int, seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """Held-out accuracy and loss with and without margins: printed by seed, then in the mean."""
    torch.set_num_threads(threads)
    parts = split(fetch_movie_ratings())
    unseen = parts["ppo"] + parts["evaluation"]
    found: Found = {}
    for learner, seed in product(LEARNERS, seeds):
        with tempfile.TemporaryDirectory() as folder:
            write_model(learner.name, Path(folder) / "model", seed)
            known = [sentence for name in learner.splits for sentence in parts[name]]
            store = label(known, Path(folder), seed, learner.pairs)
            write_held_out(unseen, Path(folder), seed, learner.held_out)
            for margins in (False, True):
                form = f"{learner.name}, {'with margins' if margins else 'without'}"
                numbers = learned(learner, store, Path(folder), dtype, seed, margins)
                for name, value in numbers.items():
                    found.setdefault(form, {}).setdefault(name, []).append(value)
                told = ", ".join(f"{name} {value:.4f}" for name, value in numbers.items())
                print(f"seed {seed}, {form}: {told}", flush=True)
    for form, numbers_of in found.items():
        print(form, {name: round(fmean(values), 4) for name, values in numbers_of.items()})
    return {"learned": found}


def write_model(name: str, folder: Path, seed: int) -> None:
    """SmolLM2 as it came, or two layers of 64 units with its tokenizer and random weights."""
    source = fetch_model("smollm2-135m-instruct")
    if name != "small":
        folder.symlink_to(source)
        return
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = None
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    for token in ("bos", "eos", "pad"):
        sizes[f"{token}_token_id"] = getattr(tokenizer, f"{token}_token_id")
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_attention_heads=4, tie_word_embeddings=True, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def label(sentences: Sequence[RatedSentence], folder: Path, seed: int, count: int) -> str:
    """A store in which a labeller has judged so many pairs of the sentences."""
    draw = random.Random(f"pairs:{seed}")
    pairs = [draw.sample(range(len(sentences)), 2) for _ in range(count)]
    by_text = {f" {s.text}": s.ratings for s in sentences}
    rows = [
        {"prompt": PROMPT, "completions": [f" {sentences[i].text}" for i in pair]} for pair in pairs
    ]
    write_jsonl(folder / "pairs.jsonl", rows)
    address = str(folder / "labels.db")
    commands.label_import(
        LabelImportConfig(
            store=address, data=str(folder / "pairs.jsonl"), mode="pairwise", overlap=0.0,
            gold_share=0.0, repeat_share=0.0,
        )
    )  # fmt: skip
    with closing(Store(address)) as store:
        with store.write() as t:
            who = t.put_labeller("simulated", "labeller", "no link")
        while task := next_assignment(store, who):
            with store.read() as t:
                _, texts = texts_of(t, task.prompt_id, task.response_ids)
            first, second = (draw.choice(by_text[text]) for text in texts)
            said = judgement(first - second, f"simulated-{task.id}")
            submit(store, who, task.id, said)
    return address


def judgement(difference: float, request: str) -> Judgement:
    """What is said of two texts whose ratings differ so."""
    if difference == 0:
        return Judgement([[0, 1]], request_id=request)
    tiers = [[0], [1]] if difference > 0 else [[1], [0]]
    strength = 1 if abs(difference) <= 2 else 2 if abs(difference) <= 4 else 3
    return Judgement(tiers, strength=strength, request_id=request)


def write_held_out(sentences: Sequence[RatedSentence], folder: Path, seed: int, count: int) -> None:
    """held-out.jsonl: pairs ordered by the mean of all raters."""
    draw = random.Random(f"held out:{seed}")
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        better, worse = sorted(draw.sample(sentences, 2), key=lambda s: -fmean(s.ratings))
        if fmean(better.ratings) > fmean(worse.ratings):
            texts = {"chosen": f" {better.text}", "rejected": f" {worse.text}"}
            rows.append({"prompt": PROMPT, **texts})
    write_jsonl(folder / "held-out.jsonl", rows)


def learned(
    learner: Learner, store: str, folder: Path, dtype: Any, seed: int, margins: bool
) -> dict[str, float]:
    """Held-out numbers of one reward model."""
    output = folder / f"margins-{margins}"
    commands.reward(
        RewardConfig(
            model=str(folder / "model"), data=store, output=output, epochs=1.0, batch_size=16,
            eval_data=str(folder / "held-out.jsonl"), eval_every=1000, seed=seed, dtype=dtype,
            label_margins=margins, **learner.settings,
        )
    )  # fmt: skip
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    held_out = [row for row in map(json.loads, lines) if "eval/accuracy" in row][-1]
    return {"accuracy": held_out["eval/accuracy"], "loss": held_out["eval/loss"]}
