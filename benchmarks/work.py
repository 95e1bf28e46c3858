"""What is measured: the same text rows, weights and settings for every side. Imports no side.

Rows are movie-review sentences rated by people, strung together to the wanted number of tokens.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["sft", "reward", "dpo", "generate"]


STOPS = (".", " .", "?", "!")
"""Tokens that end a generated answer beside EOS, so that lengths differ as those of replies do."""


@dataclass(frozen=True)
class Work:
    """One optimiser step over `rows` prompts, or one generation call."""

    kind: Kind
    rows: int
    prompt: tuple[int, int]  # fewest and most tokens
    answer: tuple[int, int]
    answers: int  # to each prompt


WORKS = {
    "sft": Work("sft", 24, (16, 64), (16, 448), 1),
    "reward-2": Work("reward", 4, (256, 256), (32, 192), 2),
    "reward-4": Work("reward", 2, (256, 256), (32, 192), 4),
    "reward-9": Work("reward", 1, (256, 256), (32, 192), 9),
    "dpo": Work("dpo", 8, (256, 256), (32, 192), 2),
    "generate": Work("generate", 32, (32, 96), (8, 128), 1),
    "generate-4": Work("generate", 4, (512, 512), (64, 64), 4),
}


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
