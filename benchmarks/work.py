"""What is measured: the same text rows, weights and settings for every side. Imports no side.

Rows are movie-review sentences rated by people, strung together to the wanted number of tokens.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["sft", "reward", "dpo", "ppo", "generate"]
PPO_EPOCHS = 4
LORA_RANK, LORA_ALPHA = 16, 32
STOPS = (" and",)
"""Tokens that end a generated answer beside EOS: this one spreads SmolLM2's lengths over 1..128."""


@dataclass(frozen=True)
class Work:
    """One optimiser step over `rows` prompts, one PPO iteration, or one generation call."""

    kind: Kind
    rows: int
    prompt: tuple[int, int]  # fewest and most tokens
    answer: tuple[int, int]
    answers: int  # to each prompt
    stops: bool = False  # whether a generated answer may end before its most tokens
    lora: bool = False


WORKS = {
    "sft": Work("sft", 24, (16, 64), (16, 448), 1),
    "reward-2": Work("reward", 4, (256, 256), (32, 192), 2),
    "reward-4": Work("reward", 2, (256, 256), (32, 192), 4),
    "reward-9": Work("reward", 1, (256, 256), (32, 192), 9),
    "dpo": Work("dpo", 8, (256, 256), (32, 192), 2),
    "dpo-4": Work("dpo", 4, (256, 256), (32, 192), 2),
    "dpo-lora": Work("dpo", 8, (256, 256), (32, 192), 2, lora=True),
    "memory": Work("dpo", 8, (256, 256), (32, 192), 2),
    "ppo": Work("ppo", 16, (48, 80), (64, 64), 1),
    "ppo-stops": Work("ppo", 8, (16, 112), (8, 128), 1, stops=True),
    "generate": Work("generate", 32, (32, 96), (8, 128), 1, stops=True),
    "generate-1": Work("generate", 1, (64, 64), (128, 128), 1),
    "generate-8": Work("generate", 8, (32, 96), (128, 128), 1),
    "generate-64": Work("generate", 64, (32, 96), (128, 128), 1),
    "generate-4": Work("generate", 4, (512, 512), (64, 64), 4),
    "decode-8": Work("generate", 8, (8, 8), (64, 64), 1),
    "decode-32": Work("generate", 32, (8, 8), (64, 64), 1),
}


def trl_settings(dtype: str) -> dict[str, Any]:
    """What both versions of TRL are told so that they train on the CPU and say and save nothing."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "learning_rate": 1e-6,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": dtype == "bfloat16",
        "disable_tqdm": True,
    }


def read_texts(path: str) -> list[dict[str, Any]]:
    """Rows of {prompt, completions}."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def stop_ids(work: Work, tokenizer: Any) -> list[int]:
    """Tokens that end a generated answer; none where all have the same length."""
    if not work.stops:
        return []
    stops = [int(tokenizer(stop)["input_ids"][0]) for stop in STOPS]
    return stops if work.kind == "ppo" else [tokenizer.eos_token_id, *stops]  # TRL's PPO takes one


def write_rows(
    work: Work, sentences: Sequence[str], count: Callable[[str], int], path: Path
) -> None:
    """Texts of the wanted lengths, evenly spread over their range, in an order of their own."""
    draw = random.Random(0)

    def text(tokens: int) -> str:
        words: list[str] = []
        while count(" ".join(words)) < tokens:
            words += draw.choice(sentences).split(" ")
        low, high = 1, len(words)
        while low < high:  # the fewest words that give as many tokens
            middle = (low + high) // 2
            low, high = (
                (low, middle) if count(" ".join(words[:middle])) >= tokens else (middle + 1, high)
            )
        return " ".join(words[:low])

    def lengths(bounds: tuple[int, int], number: int) -> list[int]:
        low, high = bounds
        spread = [low + (high - low) * i // max(1, number - 1) for i in range(number)]
        draw.shuffle(spread)
        return spread

    asked = lengths(work.prompt, work.rows)
    given = iter(lengths(work.answer, work.rows * work.answers))
    rows: list[dict[str, Any]] = []
    for tokens in asked:
        answers = [" " + text(next(given)) for _ in range(work.answers)]
        rows.append({"prompt": text(tokens), "completions": answers})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
