"""A reward model from rankings of many answers by people, ties included.

    python examples/reward_kwise.py MODEL RANKINGS.jsonl.gz OUTPUT

RANKINGS (a file or hub id) has `prompt`, `completions` and `tiers`: the answers' numbers, best
first, equal ones in one list. With none at hand, give `film-ratings`: sentences of film reviews,
each rated by 15 to 29 people (fetched from PyPI), as rankings of eight by their mean rating.
"""

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import prefloop
from prefloop.files import write_jsonl
from prefloop.recipes.fetch import RatedSentence, fetch_movie_ratings

PROMPT = "A sentence from a film review:"


def film_rankings(
    sentences: Sequence[RatedSentence], size: int = 8, seed: int = 0
) -> list[dict[str, Any]]:
    """Sentences in groups; the better the raters found one, the higher its tier."""
    shuffled = list({s.text: s for s in sentences}.values())
    random.Random(seed).shuffle(shuffled)
    rows = []
    for at in range(0, len(shuffled) - size + 1, size):
        group = shuffled[at : at + size]
        levels = sorted({s.mean for s in group}, reverse=True)
        tiers = [[i for i, s in enumerate(group) if s.mean == level] for level in levels]
        completions = [" " + s.text for s in group]
        rows.append({"prompt": PROMPT, "completions": completions, "tiers": tiers})
    return rows


def main(model: str, data: str, output: str, **settings: Any) -> prefloop.Run:
    """Trains on nine tenths of the prompts and measures on the rest."""
    if data == "film-ratings":
        data = f"{output}-rankings.jsonl"
        write_jsonl(Path(data), film_rankings(fetch_movie_ratings()))
    config = prefloop.RewardConfig(
        model=model,
        data=data,
        output=Path(output),
        loss="plackett-luce",  # the whole order at once; answers of one tier are not compared
        truncation="drop",
        **{"eval_fraction": 0.1, "batch_size": 16} | settings,
    )
    return prefloop.reward(config)


if __name__ == "__main__":
    print("model:", main(*sys.argv[1:4]).directory / "model")
