"""What `--label-margins` is worth: reward models from labellers who also say by how much.

A simulated labeller sees two sentences of film reviews with the ratings (-4..4) that one real rater
each gave them, prefers the higher, and says how much better it is by the difference of the ratings:
up to 2 slightly, up to 4 clearly, else much. All goes through a labelling store. Each seed has its
own pairs, raters and weights at the start; held-out pairs are ordered by all raters' mean.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from prefloop import commands
from prefloop.config import RewardConfig
from prefloop.config.labelling import LabelImportConfig
from prefloop.files import write_jsonl
from prefloop.labelling.assign import Judgement, next_assignment, submit
from prefloop.labelling.store import Store
from prefloop.labelling.store.reading import texts_of
from prefloop.recipes.fetch import RatedSentence, fetch_model, fetch_movie_ratings
from prefloop.recipes.sentiment_data import split

SEEDS = (0, 1, 2, 3, 4)
PAIRS, HELD_OUT = 600, 600
PROMPT = "A film review:"
Found = dict[str, dict[str, list[float]]]  # of each form and number, by seed


def measure(dtype: str, threads: int, seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """Held-out accuracy and loss with and without margins: printed by seed, then in the mean."""
    torch.set_num_threads(threads)
    parts = split(fetch_movie_ratings())
    known, unseen = parts["sft"] + parts["preference"], parts["ppo"] + parts["evaluation"]
    found: Found = {}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            store = label(known, Path(folder), seed)
            write_held_out(unseen, Path(folder), seed)
            for form, margins in (("without", False), ("with margins", True)):
                numbers = learned(store, Path(folder), dtype, seed, margins)
                for name, value in numbers.items():
                    found.setdefault(form, {}).setdefault(name, []).append(value)
                told = ", ".join(f"{name} {value:.4f}" for name, value in numbers.items())
                print(f"seed {seed}, {form}: {told}", flush=True)
    for form, numbers_of in found.items():
        print(form, {name: round(fmean(values), 4) for name, values in numbers_of.items()})
    return {"learned": found}


def label(sentences: Sequence[RatedSentence], folder: Path, seed: int) -> str:
    """A store in which a labeller has judged PAIRS pairs of the sentences."""
    draw = random.Random(f"pairs:{seed}")
    pairs = [draw.sample(range(len(sentences)), 2) for _ in range(PAIRS)]
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


def write_held_out(sentences: Sequence[RatedSentence], folder: Path, seed: int) -> None:
    """held-out.jsonl: pairs ordered by the mean of all raters."""
    draw = random.Random(f"held out:{seed}")
    rows: list[dict[str, str]] = []
    while len(rows) < HELD_OUT:
        better, worse = sorted(draw.sample(sentences, 2), key=lambda s: -fmean(s.ratings))
        if fmean(better.ratings) > fmean(worse.ratings):
            texts = {"chosen": f" {better.text}", "rejected": f" {worse.text}"}
            rows.append({"prompt": PROMPT, **texts})
    write_jsonl(folder / "held-out.jsonl", rows)


def learned(store: str, folder: Path, dtype: Any, seed: int, margins: bool) -> dict[str, float]:
    """Held-out numbers of one reward model."""
    output = folder / f"margins-{margins}"
    commands.reward(
        RewardConfig(
            model=str(fetch_model("smollm2-135m-instruct")), data=store, output=output,
            eval_data=str(folder / "held-out.jsonl"), eval_every=1000, epochs=1.0, batch_size=16,
            lr=2e-4, lora_rank=16, lora_alpha=32.0, seed=seed, dtype=dtype, label_margins=margins,
        )
    )  # fmt: skip
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    held_out = [row for row in map(json.loads, lines) if "eval/accuracy" in row][-1]
    return {"accuracy": held_out["eval/accuracy"], "loss": held_out["eval/loss"]}
