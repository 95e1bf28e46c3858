"""How even ranks' tokens are: steps of real rows, divided in turn and as training divides them.

Of each step the tokens of the rank with the most, over the mean: the others wait for it. Pairs of
chats (HH-RLHF, harmless) and rankings of 2 to 13 translations (MQM), by SmolLM2's tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from transformers import AutoTokenizer

from prefloop import distributed
from prefloop.data import formats, stream
from prefloop.data.batches import packed_length
from prefloop.data.tokenize import tokenize
from prefloop.recipes.fetch import fetch_model
from prefloop.recipes.public import harmless_pairs, mqm_rankings
from prefloop.records import RowCounts

RANKS = (2, 4, 8)
BATCHES = (32, 128)
MAX_LENGTH = 2048
Divide = Callable[[Sequence[int], int], list[list[int]]]


def in_turn(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Each rank's places, whatever they hold."""
    return [list(range(rank, len(sizes), ranks)) for rank in range(ranks)]


def measure(dtype: str, threads: int) -> dict[str, Any]:
    """All numbers, printed as a table of Markdown and returned."""
    tokenizer = AutoTokenizer.from_pretrained(fetch_model("smollm2-135m-instruct"))
    found = []
    print(
        "| rows | their tokens | a step | ranks | in turn: mean, worst | by tokens: mean, worst |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    for name, kept in (("HH pairs", harmless_pairs), ("MQM rankings", mqm_rankings)):
        counts = RowCounts()
        records = formats.load(str(kept().path), "preference", counts)
        examples = tokenize(records, tokenizer, MAX_LENGTH, "drop", counts)
        sizes = [packed_length(example) for example in examples]
        for batch in BATCHES:
            for ranks in RANKS:
                turn, even = (
                    ratios(sizes, batch, ranks, way) for way in (in_turn, distributed.shares)
                )
                print(
                    f"| {len(sizes):,} {name} | {min(sizes)}–{max(sizes):,} | {batch} | {ranks} | "
                    f"{fmean(turn):.3f}, {max(turn):.2f} | {fmean(even):.3f}, {max(even):.2f} |",
                    flush=True,
                )
                shape = {"rows": name, "batch_size": batch, "ranks": ranks}
                found.append(shape | {"in_turn": turn, "by_tokens": even})
    return {"balance": found}


def ratios(sizes: Sequence[int], batch: int, ranks: int, divide: Divide) -> list[float]:
    """Of each full step of an epoch: the heaviest rank's tokens over the mean rank's."""
    steps = list(stream.step_rows(len(sizes), batch, 1.0, 0, seed=0))
    full = [[sizes[row] for row in rows] for rows in steps if len(rows) == batch]
    return [ratio(step, ranks, divide) for step in full]


def ratio(sizes: Sequence[int], ranks: int, divide: Divide) -> float:
    """Of one step."""
    loads = [sum(sizes[place] for place in places) for places in divide(sizes, ranks)]
    return max(loads) / fmean(loads)
