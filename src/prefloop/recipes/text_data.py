"""Summaries and translations of package descriptions, and rankings of translations.

What is human: Debian's descriptions, written by its maintainers, and their German translations, by
its translators; professionals' MQM marks of translations of TED talks. What is simulated: which of
a model's answers is better, told by what they share with the human text (`scores.overlap`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from prefloop.files import write_jsonl
from prefloop.recipes.public import Row, descriptions, facts, mqm_rankings
from prefloop.recipes.splits import distinct, near_duplicates, split

SEED = 20260106
SIZES = {"sft": 4000, "preference": 800, "ppo": 800, "evaluation": 300}
LONG, SHORT, PHRASE = (20, 60), (3, 12), (3, 12)  # fewest and most words
HELD_OUT = 0.2  # of the ranked sentences
SIMULATED = "the order of a model's answers: what they share with the human text"


def write_summary(folder: Path) -> dict[str, object]:
    """The first paragraphs of an English description; its one-line description is the reference."""
    english = descriptions("en")
    rows = summaries(english.rows)
    return _write(folder, rows) | {
        "sets": facts([english]),
        "human": "descriptions, by Debian's maintainers",
        "simulated": SIMULATED,
    }


def summaries(rows: Sequence[Row]) -> list[Row]:
    """`prompt` and `reference`, shuffled; of packages that are described alike, one."""
    found = []
    for row in rows:
        text = _opening(row["long"])
        if text and _words(row["short"], SHORT):
            found.append({"prompt": f"{text}\n\nIn one line:", "reference": row["short"]})
    return [found[place] for place in distinct([row["prompt"] for row in found], SEED)]


def _opening(long: str) -> str:
    """As many of the first paragraphs as fit, or nothing where the first is too long or short."""
    kept = ""
    for paragraph in long.split("\n\n"):
        longer = f"{kept}\n\n{paragraph}".strip()
        if len(longer.split()) > LONG[1]:
            break
        kept = longer
    return kept if _words(kept, LONG) else ""


def _words(text: str, within: tuple[int, int]) -> bool:
    return within[0] <= len(text.split()) <= within[1]


def write_translation(folder: Path) -> dict[str, object]:
    """English one-line descriptions with their German translations."""
    english, german = descriptions("en"), descriptions("de")
    return _write(folder, translations(english.rows, german.rows)) | {
        "sets": facts([english, german]),
        "human": "descriptions, by Debian's maintainers, and translations, by its translators",
        "simulated": SIMULATED,
    }


def write_mqm(folder: Path) -> dict[str, object]:
    """Ranked German translations of English sentences of TED talks."""
    ranked = mqm_rankings()
    parts = rankings(ranked.rows)
    for name, part in parts.items():
        write_jsonl(folder / f"{name}.jsonl", part)
    return {
        "rows": {name: len(part) for name, part in parts.items()},
        "sets": facts([ranked]),
        "human": "marks of the translations, by professionals",
    }


def translations(english: Sequence[Row], german: Sequence[Row]) -> list[Row]:
    """`prompt` and `reference`, shuffled, of lines that are not the same in both languages."""
    theirs = {row["md5"]: row["short"] for row in german}
    found = [
        (row["short"], theirs[row["md5"]])
        for row in english
        if row["md5"] in theirs
        and row["short"] != theirs[row["md5"]]
        and _words(row["short"], PHRASE)
    ]
    lines = [found[place] for place in distinct([line for line, _ in found], SEED, words=2)]
    return [{"prompt": ask_german(line), "reference": text} for line, text in lines]


def ask_german(english: str) -> str:
    """What the model is asked."""
    return f"English: {english}\nGerman:"


def rankings(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """MQM's rankings to train on and held out; those in which all are tied are left out."""
    found = [
        {
            "prompt": ask_german(row["prompt"]),
            "completions": [" " + text for text in row["completions"]],
            "tiers": row["tiers"],
        }
        for row in rows
        if len(row["tiers"]) > 1
    ]
    groups = near_duplicates([row["prompt"] for row in found], words=2)
    shares = {"rankings": 1 - HELD_OUT, "held-out": HELD_OUT}
    parts = split(groups, shares, SEED)
    return {name: [found[place] for place in places] for name, places in parts.items()}


def _write(folder: Path, rows: Sequence[Row]) -> dict[str, Mapping[str, int]]:
    """Write sft, preference, ppo and evaluation .jsonl, smaller where rows are few."""
    counts, start = {}, 0
    scale = min(1.0, len(rows) / sum(SIZES.values()))
    for name, size in SIZES.items():
        part = rows[start : start + int(scale * size)]
        start += len(part)
        if name == "sft":
            part = [{"prompt": r["prompt"], "completion": " " + r["reference"]} for r in part]
        write_jsonl(folder / f"{name}.jsonl", part)
        counts[name] = len(part)
    return {"rows": counts}
