"""Small sets in the form of the public ones, for $PREFLOOP_DATA."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from prefloop.files import write_jsonl

THINGS = [f"{a}{b}" for a in ("ba", "ko", "mi", "tu", "re") for b in ("lan", "dor", "sik", "wem")]


def letters(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """A judge that hardly ever gives two texts the same score."""
    return [float(sum(map(ord, text))) for text in completions]


def write_sets(folder: Path) -> None:
    """All that the five uses read: near duplicates are rare, orders follow from the words."""
    draw = random.Random(0)

    def words(n: int) -> str:
        return " ".join(draw.choice(THINGS) for _ in range(n))

    def transcript(answer: str, asked: str) -> str:
        return f"\n\nHuman: {asked}\n\nAssistant: {answer}"

    harmless = []
    for _ in range(40):
        asked = words(6)
        good, bad = transcript("No, " + words(2), asked), transcript(words(3), asked)
        harmless.append({"chosen": good, "rejected": bad})
    pandalm = [
        {
            "prompt": words(6),
            "completions": [words(3), words(2)],
            "raters": [[[0], [1]], [[0], [1]], [[1], [0]]],
            "models": ["a", "b"],
        }
        for _ in range(40)
    ]
    llmbar = [
        {"prompt": words(6), "chosen": words(2), "rejected": words(2), "subset": "Natural"}
        for _ in range(5)
    ]
    llmbar[0]["prompt"] = str(pandalm[7]["prompt"]).upper()
    english = [
        {"package": f"p{n}", "md5": f"{n:x}", "short": words(4), "long": words(26)}
        for n in range(80)
    ]
    german = [{**row, "short": str(row["short"]).replace("a", "ä"), "long": ""} for row in english]
    rankings = [
        {
            "prompt": words(5),
            "completions": [words(4) for _ in range(3)],
            "tiers": [[1], [0, 2]],
            "mqm": [-1.0, 0.0, -1.0],
        }
        for _ in range(20)
    ]
    headlines = []
    for number in range(300):
        satire = number % 2 == 0
        told = "area man shocked" if satire else "mayor opens bridge"
        headlines.append({"text": f"{words(3)} {told} {words(2)}", "sarcastic": satire})
    sentences = []
    for number in range(300):
        liked = number % 2 == 0
        told = "is fine and moving" if liked else "is dull and stale"
        ratings = [draw.choice((1, 2, 3) if liked else (-1, -2, -3)) for _ in range(15)]
        sentences.append({"text": f"{words(5)} {told}, {words(2)}", "ratings": ratings})
    sets = {
        "movie-ratings": sentences,
        "hh-harmless": harmless,
        "pandalm-human-pairs": pandalm,
        "llmbar-pairs": llmbar,
        "debian-descriptions-en": english,
        "debian-descriptions-de": german,
        "mqm-ted-ende-rankings": rankings,
        "headlines": headlines,
    }
    for name, rows in sets.items():
        write_jsonl(folder / f"{name}.jsonl.gz", rows)
