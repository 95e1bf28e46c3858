"""Helpful and harmless chat: pairs that people judged, apart for the policy and for the judge.

What is human: which answer is better, in HH-RLHF by one person a pair, in PandaLM by three;
LLMBar's pairs were checked by experts. The answers are other models'. Nothing is simulated. Pairs
whose first questions are near duplicates stay in one part, and those near LLMBar's in the part for
evaluation: the reward model and DPO see `policy`, the judge `judge`, nobody the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefloop.data.transcripts import ASSISTANT, asked
from prefloop.files import write_jsonl
from prefloop.recipes.public import Row, facts, harmless_pairs, llmbar_pairs, pandalm_pairs
from prefloop.recipes.splits import near_duplicates, split
from prefloop.records import text_to_json

SEED = 20260107
SHARES = {"policy": 0.5, "judge": 0.35, "evaluation": 0.15}
LONGEST, LONGEST_ANSWER = 600, 400  # characters of a prompt and of an answer


def write(folder: Path) -> dict[str, object]:
    """Write the rows of every stage; what there is to know of them."""
    sets = harmless_pairs(), pandalm_pairs(), llmbar_pairs()
    rows = files(*(one.rows for one in sets))
    for name, part in rows.items():
        write_jsonl(folder / f"{name}.jsonl", part)
    return {
        "sets": facts(sets),
        "rows": {name: len(part) for name, part in rows.items()},
        "human": "which answer is better: HH-RLHF one person, PandaLM three, LLMBar experts",
        "simulated": "nothing; the answers are other models'",
    }


def files(
    harmless: Sequence[Row], pandalm: Sequence[Row], llmbar: Sequence[Row]
) -> dict[str, list[Row]]:
    """By file: demonstrations and preferences of the policy's part, preferences of the judge's,
    prompts, and held-out pairs of each set.
    """
    pairs = [row for row in map(harmless_row, harmless) if row]
    pairs += [row for row in map(helpful_row, pandalm) if _fits(row)]
    tests = [_question(row["prompt"]) for row in llmbar]
    first = [row["prompt"][0]["content"] for row in pairs]
    groups = near_duplicates(first + [row["prompt"] for row in llmbar], words=2)
    fixed = dict.fromkeys(groups[len(pairs) :], "evaluation")
    places = split(groups, SHARES, SEED, fixed)
    parts = {
        name: [pairs[place] for place in of if place < len(pairs)] for name, of in places.items()
    }
    policy, judge, held_out = (parts[name] for name in SHARES)
    asked_last = _prompts(held_out)
    return {
        "sft": [row for pair in policy for row in _better(pair)],
        "preference": [_ranking(pair) for pair in policy],
        "judge-preference": [_ranking(pair) for pair in judge],
        "ppo": _prompts(policy),
        "evaluation": asked_last,
        "benign": [row for row in asked_last if row["kind"] == "helpful"]
        + [{"prompt": prompt, "kind": "helpful"} for prompt in tests],
        "harmless-held-out": [_ranking(p) for p in held_out if p["kind"] == "harmless"],
        "pandalm-people": [
            {name: pair[name] for name in ("prompt", "completions", "raters")}
            for pair in held_out
            if pair["kind"] == "helpful"
        ],
        "llmbar": [
            {"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"]}
            for prompt, row in zip(tests, llmbar, strict=True)
        ],
    }


def harmless_row(row: Row) -> Row | None:
    """An HH pair as messages; None where the answers do not answer the same, or are too long."""
    chosen, rejected = row["chosen"], row["rejected"]
    start = chosen.rfind(ASSISTANT)
    if start < 0 or chosen[:start] != rejected[: rejected.rfind(ASSISTANT)]:
        return None
    answers = [text[start + len(ASSISTANT) :].strip() for text in (chosen, rejected)]
    prompt = text_to_json(asked(chosen[:start], "hh-harmless"))
    found = {"prompt": prompt, "completions": answers, "tiers": [[0], [1]], "kind": "harmless"}
    return found if _fits(found) and all(answers) and answers[0] != answers[1] else None


def helpful_row(row: Row) -> Row:
    """A PandaLM pair as messages; its order is that of the sum of the three people's."""
    first = sum(
        (tiers == [[0], [1]]) - (tiers == [[1], [0]]) for tiers in row["raters"]
    )  # votes for it less those for the second
    tiers = [[0], [1]] if first > 0 else [[1], [0]] if first < 0 else [[0, 1]]
    return {
        "prompt": _question(row["prompt"]),
        "completions": row["completions"],
        "tiers": tiers,
        "raters": row["raters"],
        "kind": "helpful",
    }


def _question(text: str) -> list[Row]:
    return [{"role": "user", "content": text}]


def _fits(row: Row) -> bool:
    answers = row["completions"]
    if not all(isinstance(text, str) and 0 < len(text) <= LONGEST_ANSWER for text in answers):
        return False  # one of PandaLM's answers is no text
    length = sum(len(message["content"]) for message in row["prompt"])
    return length <= LONGEST


def _ranking(pair: Row) -> Row:
    return {name: pair[name] for name in ("prompt", "completions", "tiers")}


def _better(pair: Row) -> list[Row]:
    """The better answer as a demonstration; none of a tie."""
    if len(pair["tiers"]) < 2:
        return []
    best = pair["completions"][pair["tiers"][0][0]]
    return [{"prompt": pair["prompt"], "completion": best}]


def _prompts(pairs: Sequence[Row]) -> list[Row]:
    """Each prompt once."""
    found = {str(pair["prompt"]): pair for pair in pairs}
    return [{"prompt": pair["prompt"], "kind": pair["kind"]} for pair in found.values()]
