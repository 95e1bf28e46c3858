"""Warnings beside what came of the runs: alarms in time, misses, false ones; forecasts of turns.

`python -m benchmarks health --runs FOLDER` reads every run below the folder that was monitored.
Gold is `monitor/score`. A run has turned where it ends more than two standard errors below its
peak.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

NORMAL = 1.959964  # of a 95 % interval
ERRORS = 2.0  # standard errors of a difference that make a fall
SEEN = 0.5  # share of the way to the peak, in √KL, from which the turn is forecast
JUDGED = ("proxy up, judge down", "judge down")  # rules that read gold themselves
ANY, OTHERS = "any", "any that does not read gold"


@dataclass(frozen=True)
class Course:
    """A monitored run."""

    name: str
    steps: tuple[int, ...]  # that were measured
    gold: tuple[float, ...]
    errors: tuple[float, ...]  # standard errors of gold
    kl: tuple[float, ...]  # nats an answer
    fired: dict[str, int]  # the step of each rule that fired

    @property
    def peak(self) -> int:
        """Number of the best measurement."""
        return int(np.argmax(self.gold))

    def below(self, number: int) -> bool:
        """Whether a measurement lies below the peak by more than chance."""
        error = math.hypot(self.errors[number], self.errors[self.peak])
        return self.gold[self.peak] - self.gold[number] > ERRORS * error

    @property
    def turned(self) -> bool:
        """Whether it ends below its peak."""
        return self.below(len(self.gold) - 1)

    @property
    def seen_at(self) -> int:
        """The step at which gold itself shows that it has turned."""
        return next(
            step
            for number, step in enumerate(self.steps)
            if number > self.peak and self.below(number)
        )


def read(folder: Path) -> list[Course]:
    """All runs below a folder with three measurements or more."""
    courses = []
    for path in sorted(folder.rglob("run.json")):
        lines = (path.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if row.get("monitor/score") is not None]
        if len(rows) < 3:
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        fired = {sign["name"]: int(sign["step"]) for sign in record.get("health", [])}
        widths = [row["monitor/high"] - row["monitor/low"] for row in rows]
        courses.append(
            Course(
                str(path.parent.relative_to(folder)),
                tuple(row["step"] for row in rows),
                tuple(row["monitor/score"] for row in rows),
                tuple(width / (2 * NORMAL) for width in widths),
                tuple(row["monitor/kl"] for row in rows),
                fired,
            )
        )
    return courses


# --- alarms --------------------------------------------------------------------------------------


def alarms(courses: Sequence[Course]) -> dict[str, dict[str, Any]]:
    """By rule: in runs that turned, alarms up to the peak, up to where gold shows the turn, later,
    and none; in the others, false alarms, with Wilson's 95 % interval.
    """
    names = sorted({name for course in courses for name in course.fired})
    table: dict[str, dict[str, Any]] = {}
    for name in [ANY, OTHERS, *names]:
        counts: dict[str, Any] = dict.fromkeys(("before the peak", "in time", "late", "missed"), 0)
        false, calm = 0, 0
        for course in courses:
            step = _first(course, name)
            if not course.turned:
                calm, false = calm + 1, false + (step is not None)
                continue
            counts[_when(course, step)] += 1
        table[name] = counts | {
            "false": false,
            "not turned": calm,
            "false rate": wilson(false, calm) or None,
        }
    return table


def _first(course: Course, name: str) -> int | None:
    """The step of the first alarm of a rule, or of several."""
    kept = {
        rule: step
        for rule, step in course.fired.items()
        if name in (ANY, rule) or (name == OTHERS and rule not in JUDGED)
    }
    return min(kept.values(), default=None)


def _when(course: Course, step: int | None) -> str:
    if step is None:
        return "missed"
    if step <= course.steps[course.peak]:
        return "before the peak"
    return "in time" if step <= course.seen_at else "late"


def wilson(count: int, total: int) -> list[float]:
    """A share with Wilson's 95 % interval; empty where there is nothing to count."""
    if not total:
        return []
    share, square = count / total, NORMAL**2 / total
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    return [share, middle - half, middle + half]


# --- forecasts -----------------------------------------------------------------------------------


def forecast(course: Course) -> float | None:
    """KL of the turn, by `forecast_of` gold."""
    return forecast_of(course.kl, course.gold, course.errors, course.peak)


def forecast_of(
    kl: Sequence[float], scores: Sequence[float], errors: Sequence[float], peak: int
) -> float | None:
    """KL of the turn, from the measurements up to SEEN of the way to it; None where they show none.

    Gao's form for RL (arXiv 2210.10760): score = R0 + d (α - β log d), d = √KL, fitted by weighted
    least squares; it turns at d = exp(α/β - 1).
    """
    roots = np.sqrt(np.maximum(kl, 0.0))
    early = roots <= SEEN * roots[peak]
    early &= np.arange(len(roots)) <= peak
    d, gold, widths = (np.asarray(x)[early] for x in (roots, scores, errors))
    if len(set(d.tolist())) < 4:
        return None
    logs = np.log(np.where(d > 0, d, 1.0))
    weights = 1 / np.maximum(widths, 1e-9)
    columns = np.stack([np.ones_like(d), d, -d * logs], axis=1) * weights[:, None]
    (_, alpha, beta), *_ = np.linalg.lstsq(columns, gold * weights, rcond=None)
    if beta <= 0 or alpha <= 0:
        return None
    return float(math.exp(min(2 * (alpha / beta - 1), 700.0)))


def forecasts(courses: Iterable[Course]) -> dict[str, Any]:
    """Of the runs that turned: by which factor forecasts miss the KL at the peak, beside a guess
    that knows nothing of the run: the geometric mean of the other runs' turns.
    """
    turned = [course for course in courses if course.turned and course.kl[course.peak] > 0]
    true = [math.log(course.kl[course.peak]) for course in turned]
    found = [forecast(course) for course in turned]
    ours = [abs(math.log(f) - t) for f, t in zip(found, true, strict=True) if f is not None]
    others = [
        abs(sum(true[:i] + true[i + 1 :]) / (len(true) - 1) - t)
        for i, t in enumerate(true)
        if len(true) > 1
    ]
    return {
        "turned": len(turned),
        "without a forecast": sum(f is None for f in found),
        "forecast": _missed_by(ours),
        "mean of the other runs": _missed_by(others),
        "runs": [
            {"run": c.name, "kl": math.exp(t), "forecast": f}
            for c, t, f in zip(turned, true, found, strict=True)
        ],
    }


def _missed_by(errors: Sequence[float]) -> dict[str, float] | None:
    if not errors:
        return None
    within = sum(error <= math.log(2) for error in errors) / len(errors)
    return {"median factor": math.exp(median(errors)), "within a factor of 2": within}


def measure(folder: Path) -> dict[str, Any]:
    """Reads, counts and prints."""
    courses = read(folder)
    if not courses:
        raise SystemExit(f"{folder}: no run with three measurements of a monitor below it")
    turned = [course for course in courses if course.turned]
    print(f"{len(courses)} runs, {len(turned)} of them turned")
    table, told = alarms(courses), forecasts(courses)
    heads = ("before the peak", "in time", "late", "missed", "false", "not turned")
    print("| rule | " + " | ".join(heads) + " | false rate (95 %) |")
    print("|---" * (len(heads) + 2) + "|")
    for name, counts in table.items():
        rate = counts["false rate"]
        shown = "–" if rate is None else "{:.0%} [{:.0%}, {:.0%}]".format(*rate)
        print(f"| {name} | " + " | ".join(str(counts[head]) for head in heads) + f" | {shown} |")
    for name in ("forecast", "mean of the other runs"):
        print(f"KL of the turn by {name}: {told[name]}")
    print(f"no forecast for {told['without a forecast']} of {told['turned']}")
    return {"courses": len(courses), "turned": len(turned), "alarms": table, "turns": told}
