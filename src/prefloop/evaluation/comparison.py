"""What a comparison found: everything that the page, the table and compare.json show. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefloop.intervals import Interval
from prefloop.rewards.health import Sign, Vitals


@dataclass(frozen=True)
class RunRecord:
    """What a run directory tells about a model: its cost and its curves."""

    command: str
    cpu_seconds: float
    wall_seconds: float
    peak_memory_gib: float
    tokens: int | None
    metrics: Mapping[str, tuple[list[int], list[float]]]  # steps and values by name


@dataclass(frozen=True)
class Way:
    """One way to answer the prompts (a model, or best-of-n), measured."""

    name: str
    vitals: Vitals
    win_rate: Interval | None  # against SFT; None for SFT itself
    kl_is_bound: bool  # best-of-n's KL is a bound, not an estimate
    signs: tuple[Sign, ...]
    cpu_seconds_per_answer: float
    run: RunRecord | None
    examples: tuple[str, ...]  # its first answer to each prompt shown
    example_scores: tuple[float, ...]  # judge's


@dataclass(frozen=True)
class Comparison:
    """Everything the report shows; `ways` begins with SFT."""

    ways: tuple[Way, ...]
    prompts: int
    example_prompts: tuple[str, ...]
    frontier: tuple[tuple[int, float, float], ...]  # best-of-n: n, KL bound, judge's score
    reward_run: RunRecord | None
    settings: Mapping[str, object]
    notes: tuple[str, ...] = field(default=())


def read_run(directory: Path) -> RunRecord | None:
    """The record of a run directory (or of its model/), or None where there is none."""
    for folder in (directory, directory.parent):
        if (folder / "run.json").exists():
            record: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            return RunRecord(
                command=record["command"],
                cpu_seconds=record["cpu_seconds"],
                wall_seconds=record["wall_seconds"],
                peak_memory_gib=record["peak_memory_gib"],
                tokens=record.get("tokens"),
                metrics=_read_metrics(folder / "metrics.jsonl"),
            )
    return None


def _read_metrics(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    series: dict[str, tuple[list[int], list[float]]] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        row = json.loads(line)
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                steps, values = series.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(float(value))
    return series
