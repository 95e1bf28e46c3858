"""How the cost grows: a step against answers, lengths, batch, model; decoding against batch.

Writes docs/images/growth.svg. Every point is a process of its own, so that no peak is another's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import comb
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.sides import MODELS, Side, prepare_models
from prefloop.models.load import load_tokenizer

COLOURS = ("#3b7dd8", "#e07a1f", "#2f9e62")
PICTURE = Path("docs/images/growth.svg")
VOCABULARY = 49152
WARM_UP = 3  # turns; the second still takes new memory
SHAPES = {  # width, inner width, layers, heads, key heads
    "30M": (256, 768, 20, 4, 2),
    "360M": (960, 2560, 32, 15, 5),
}
"""Random Llamas with SmolLM2's vocabulary and tied head; 135M is SmolLM2 itself."""


@dataclass(frozen=True)
class Point:
    """What one process measures."""

    rows: int = 2
    answers: int = 2
    prompt: int = 256
    answer: int = 64
    model: str = "135M"
    decode: bool = False

    @property
    def padded_pairs(self) -> int:
        """Tokens of all pairs of answers, each with its prompt and padded to one length."""
        return self.rows * comb(self.answers, 2) * 2 * (self.prompt + self.answer)


BASE = Point()
SERIES: dict[str, tuple[str, Sequence[Any], Point]] = {
    "answers to a prompt, K": ("answers", (2, 4, 9, 16), replace(BASE, rows=1)),
    "tokens of a prompt": ("prompt", (64, 256, 512, 900), BASE),
    "tokens of an answer": ("answer", (32, 128, 256, 512), BASE),
    "prompts of a step": ("rows", (1, 2, 4, 8), BASE),
    "model": ("model", ("30M", "135M", "360M"), BASE),
    "answers written at once": (
        "rows",
        (1, 2, 4, 8, 16, 32, 64),
        Point(answers=1, prompt=32, answer=32, decode=True),
    ),
}


def measure(dtype: str, threads: int) -> dict[str, Any]:
    """All series, printed, returned and drawn."""
    folders = _models()
    found: dict[str, list[dict[str, Any]]] = {}
    for title, (field, values, base) in SERIES.items():
        found[title] = []
        for value in values:
            point = replace(base, **{field: value})
            words = (folders[point.model], dtype, json.dumps(asdict(point)))
            with Side("growth_side", *words, threads=threads) as side:
                for _ in range(WARM_UP):
                    side.turn()
                turn = side.turn()
            turn |= {field: value, "padded_pairs": point.padded_pairs}
            turn["per_second"] = turn["tokens"] / turn["wall"]
            print(
                f"{title} {value}: {turn['tokens']} tokens (all pairs padded: "
                f"{point.padded_pairs}), CPU {turn['cpu']:.2f} s, {turn['peak_gib']:.2f} GiB, "
                f"{turn['per_second']:.0f} tokens/s",
                flush=True,
            )
            found[title].append(turn)
    draw(found, PICTURE)
    return {"growth": found}


def _models() -> dict[str, str]:
    policy = f"{prepare_models()}/policy"
    folders = {"135M": policy}
    for name, (width, inner, layers, heads, key_heads) in SHAPES.items():
        folder = MODELS / name
        folders[name] = str(folder)
        if (folder / "config.json").exists():
            continue
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        load_tokenizer(policy).save_pretrained(folder)
    return folders


def draw(found: dict[str, list[dict[str, Any]]], target: Path) -> None:
    """A panel a series: CPU seconds (left) and peak GiB (right) of a step, or tokens/s."""
    with rc_context({"svg.hashsalt": "prefloop", "font.size": 9}):
        figure = Figure(figsize=(10, 5.6), layout="constrained")
        grid = figure.subplots(2, 3)
        for axes, (title, turns) in zip(grid.flat, found.items(), strict=True):
            _panel(axes, title, turns)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, metadata={"Date": None})


def _panel(axes: Axes, title: str, turns: list[dict[str, Any]]) -> None:
    field, _, base = SERIES[title]
    places = [turn[field] for turn in turns]
    axes.set_xlabel(title)
    axes.grid(alpha=0.25)
    if base.decode:
        axes.plot(places, [t["per_second"] for t in turns], "o-", color=COLOURS[2])
        axes.set_xscale("log", base=2)
        axes.set_ylabel("tokens/s, decoding")
    else:
        axes.plot(places, [t["cpu"] for t in turns], "o-", color=COLOURS[0])
        axes.set_ylabel("CPU s a step", color=COLOURS[0])
        right = axes.twinx()
        right.plot(places, [t["peak_gib"] for t in turns], "s--", color=COLOURS[1])
        right.set_ylabel("peak GiB", color=COLOURS[1])
        right.set_ylim(bottom=0)
    if field == "answers":  # what padding all pairs would cost at the first point's rate
        rate = turns[0]["cpu"] / turns[0]["tokens"]
        axes.plot(places, [rate * t["padded_pairs"] for t in turns], ":", color=COLOURS[0])
        axes.set_title("dotted: all pairs, padded, at K = 2's cost a token", fontsize=8)
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
