"""What a comparison found: everything that the page, the table and compare.json show. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefloop.config.resolve import read_yaml
from prefloop.errors import UserError
from prefloop.evaluation.calibration import RewardCalibration
from prefloop.evaluation.people import PeopleVerdict
from prefloop.intervals import Interval, complement
from prefloop.resume import read_record
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
    record: Mapping[str, Any] = field(default_factory=dict)  # run.json
    settings: Mapping[str, Any] = field(default_factory=dict)  # config.yaml
    folder: str = ""


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
    runs: tuple[Way, ...] = ()  # each by itself, where the way was trained more than once


@dataclass(frozen=True)
class PairVerdict:
    """Two ways on the same prompts, by the judge."""

    first: str
    second: str
    difference: Interval  # mean score of the first minus that of the second
    p: float  # two-sided, of no difference
    p_holm: float  # by Holm over all pairs
    win_rate: Interval  # of the first's answers, ties half
    length_controlled: Interval | None  # the win rate at equal length

    def of(self, way: str) -> Interval:
        """The difference, seen from `way`, one of the two."""
        d = self.difference
        return d if way == self.first else Interval(-d.mean, -d.high, -d.low)

    def wins(self, way: str) -> Interval:
        """The win rate, seen from `way`."""
        return self.win_rate if way == self.first else complement(self.win_rate)

    def wins_at_equal_length(self, way: str) -> Interval | None:
        """The length-controlled win rate, seen from `way`."""
        rate = self.length_controlled
        return rate if rate is None or way == self.first else complement(rate)


@dataclass(frozen=True)
class WholeCost:
    """CPU seconds of every training run that led to a way, first ones first."""

    way: str
    parts: tuple[tuple[str, float], ...]

    @property
    def total(self) -> float:
        """CPU seconds in all."""
        return sum(seconds for _, seconds in self.parts)


@dataclass(frozen=True)
class Point:
    """What a run had reached at a step of its training."""

    way: str
    run: int  # 1, 2, ... of the way's runs
    step: int
    kl: float  # nats an answer, from the run's start
    proxy: float | None  # the score that it was trained on
    gold: Interval | None  # of a score that it was not trained on


@dataclass(frozen=True)
class Comparison:
    """Everything the report shows; `ways` begins with SFT."""

    ways: tuple[Way, ...]
    prompts: int
    frontier: tuple[tuple[int, float, float], ...]  # best-of-n: n, KL bound, judge's score
    reward_run: RunRecord | None
    settings: Mapping[str, object]
    notes: tuple[str, ...] = field(default=())
    verdicts: tuple[PairVerdict, ...] = ()  # on every two ways
    sentences: tuple[str, ...] = ()  # the answer in words, one a way but SFT
    whole_costs: tuple[WholeCost, ...] = ()
    checkpoints: tuple[Point, ...] = ()
    people: PeopleVerdict | None = None  # of `prefloop evaluate people`
    calibration: RewardCalibration | None = None  # of the reward model
    unjudged: int = 0  # answers that got no score


def read_run(directory: Path) -> RunRecord | None:
    """The record of a run directory (or of its model/), or None where there is none."""
    folder = run_directory(directory)
    record = read_record(folder) if folder else None
    if folder is None or record is None:
        return None
    settings = folder / "config.yaml"
    return RunRecord(
        command=record["command"],
        cpu_seconds=record["cpu_seconds"],
        wall_seconds=record["wall_seconds"],
        peak_memory_gib=record["peak_memory_gib"],
        tokens=record.get("tokens"),
        metrics=_read_metrics(folder / "metrics.jsonl"),
        record=record,
        settings=read_yaml(settings) if settings.exists() else {},
        folder=str(folder.absolute()),
    )


def run_directory(model: Path) -> Path | None:
    """The run directory that a model's path is, or is the `model/` of."""
    return next((f for f in (model, model.parent) if (f / "run.json").exists()), None)


def _read_metrics(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """By name; of a run that goes on, without the line that is being written."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            break
        row = parsed_line(line, f"{path}:{number}")
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                steps, values = series.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(float(value))
    return series


def parsed_line(line: bytes, where: str) -> dict[str, Any]:
    """A line of metrics.jsonl or answers.jsonl; UserError where it is none."""
    try:
        row = json.loads(line)
        if isinstance(row, dict):
            return row
    except ValueError:
        pass
    raise UserError(f"{where}: not a line of a run; remove it")
