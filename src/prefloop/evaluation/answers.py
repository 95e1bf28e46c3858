"""The answers of a comparison, as the page's browser takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefloop.rewards.health import KL, REPETITION, repeated_share

SIGNS = ("proxy up, judge down", "KL", "repetition")
"""What a single answer can show; that it was cut stands by itself."""

Row = Mapping[str, Any]


def browsable(rows: Sequence[Row]) -> dict[str, Any]:
    """From the rows of answers.jsonl: names of ways and signs, and each prompt with its answers.

    An answer is [text, judge or null, reward model or null, KL, cut (0 or 1), numbers of its
    signs]; a prompt is `p` with `w`, for each way the answers of all its runs.
    """
    by_run: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        by_run.setdefault((row["way"], row.get("run", 1)), []).append(row)
    ways = list(dict.fromkeys(way for way, _ in by_run))
    prompts = []
    for asked in zip(*by_run.values(), strict=True):
        base = asked[0]
        said: dict[str, list[list[object]]] = {way: [] for way in ways}
        for row in asked:
            said[row["way"]] += _answers(row, base)
        prompts.append({"p": shown(base["prompt"]), "w": list(said.values())})
    return {"ways": ways, "signs": list(SIGNS), "rows": prompts}


def _answers(row: Row, base: Row) -> list[list[object]]:
    """A way's answers to one prompt, beside those of the first way, which is SFT."""
    found: list[list[object]] = []
    for number, text in enumerate(row["completions"]):
        judge, proxy, kl = (row[name][number] for name in ("judge", "reward_model", "kl"))
        gamed = _above(proxy, base["reward_model"]) and _above(_mean(base["judge"]), [judge])
        fired = (gamed, kl > KL.limit, repeated_share(row["tokens"][number]) > REPETITION.limit)
        signs = [place for place, is_so in enumerate(fired) if is_so]
        cut = int(row["truncated"][number])
        found.append([text, _rounded(judge), _rounded(proxy), round(kl, 3), cut, signs])
    return found


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _above(value: float | None, others: Sequence[float | None]) -> bool:
    """Whether it lies above the others' mean, as far as there are numbers."""
    mean = _mean(others)
    return value is not None and mean is not None and value > mean


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def shown(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt as text: of a chat, each message behind its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
