"""A small store for tests: labellers, and tasks of a few answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefloop.config.labelling import LabelImportConfig
from prefloop.files import write_jsonl
from prefloop.labelling import imports
from prefloop.labelling.assign import Judgement
from prefloop.labelling.store import Store

NO_EXTRAS = {"overlap": 0.0, "gold_share": 0.0, "repeat_share": 0.0}


class Clock:
    """A clock that a test sets."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def rows(count: int, answers: int = 3, **columns: object) -> list[dict[str, Any]]:
    return [
        {"prompt": f"prompt {n}", "completions": [f" answer {n}.{k}" for k in range(answers)]}
        | columns
        for n in range(count)
    ]


def put(folder, data, address=None, **changes):
    """Import rows, or a folder that `compare` wrote; the result of `label import`."""
    if not isinstance(data, Path):
        write_jsonl(folder / "rows.jsonl", data)
        data = folder / "rows.jsonl"
    settings: dict[str, Any] = {"store": address or str(folder / "labels.db"), **NO_EXTRAS}
    config = LabelImportConfig(data=str(data), **{**settings, **changes})
    return imports.run(config)


OPENED: list[Store] = []
"""Closed after each test (conftest.py)."""


def open_store(folder, clock=None, address=None):
    OPENED.append(
        Store(address or str(folder / "labels.db"), **({"clock": clock} if clock else {}))
    )
    return OPENED[-1]


def add(store, *names, role="labeller"):
    """New labellers' ids; their tokens are their names."""
    with store.write() as t:
        return [t.put_labeller(name, role, f"token-{name}") for name in names]


def in_order(assignment, request, **said):
    """The answers in the order of the task, best first."""
    tiers = [[i] for i in range(len(assignment.shown))]
    values = {"tiers": tiers, "request_id": request, "base_version": assignment.version}
    return Judgement(**{**values, **said})


def compare_folder(folder, answers, prompts=None, judge=len, reward_model=None, cut=()):
    """What `prefloop compare` leaves: `answers` holds each way's lists of texts, one a prompt."""
    prompts = prompts or [f"prompt {n}" for n in range(len(next(iter(answers.values()))))]
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(
        folder / "answers.jsonl",
        [
            {
                "prompt": prompt,
                "way": way,
                "completions": texts,
                "tokens": [list(range(len(text))) for text in texts],
                "judge": [float(judge(text)) for text in texts],
                "reward_model": [reward_model and float(reward_model(text)) for text in texts],
                "kl": [0.0] * len(texts),
                "truncated": [text in cut for text in texts],
            }
            for way, by_prompt in answers.items()
            for prompt, texts in zip(prompts, by_prompt, strict=True)
        ],
    )
    even = {"mean": 0.0, "low": 0.0, "high": 0.0}
    numbers = {"length": 1.0, "truncated": 0.0, "distinct_2": 1.0, "repeated": 0.0}
    way = {"vitals": {"gold": even, "proxy": None, "kl": even, **numbers}, "win_rate": None}
    way |= {"kl_is_bound": False, "signs": [], "cpu_seconds_per_answer": 0.0, "run": None}
    models = [f"{name}=runs/{name}" for name in list(answers)[1:]]
    found = {
        "ways": [{"name": name, **way, "runs": []} for name in answers],
        "prompts": len(prompts),
        "frontier": [],
        "reward_run": None,
        "settings": {"sft": "runs/sft", "models": models, "judge": "mine:judge", "seed": 0},
        "notes": [],
    }
    (folder / "compare.json").write_text(json.dumps(found))
    return folder
