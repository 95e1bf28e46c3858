"""What benchmarks.labels found: intervals, judgements to an accuracy, tables and the figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from math import exp, log
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from prefloop.intervals import Interval, estimate

PAIRS, RANKINGS, ACTIVE = "random pairs", "random rankings", "active pairs"
MAJORITY, WEIGHTS = "three a pair", "three, weighed"
WAYS = (PAIRS, RANKINGS, ACTIVE, MAJORITY, WEIGHTS)
COUNTS = ("judgements", "least comparisons", "sorting comparisons")
COLOURS = dict(zip(WAYS, ("#3b7dd8", "#e07a1f", "#2f9e62", "#8a8f98", "#b13fa8"), strict=True))

Floats = NDArray[np.float64]
Parts = Sequence[tuple[int, Mapping[str, Any]]]
"""Each part with its seed."""


def summary(parts: Parts) -> dict[str, Any]:
    """Of one set: each way's points with intervals over prompts and seeds, judgements to what all
    random pairs reach, and differences to that.
    """
    curves = {way: _points(parts, way) for way in _ways(parts)}
    target = curves[PAIRS][-1]["values"]
    goal = float(target.mean())
    found: dict[str, Any] = {"target": asdict(_interval(target)), "ways": {}}
    for way, points in curves.items():
        seeds = range(len(points[0]["values"]))
        reached = {
            count: [
                reach([(p["cost"][n], float(p["values"][s].mean())) for p in points], goal)
                for s in seeds
            ]
            for n, count in enumerate(COUNTS)
        }
        together = {
            count: reach([(p["cost"][n], float(p["values"].mean())) for p in points], goal)
            for n, count in enumerate(COUNTS)
        }
        found["ways"][way] = {
            "points": [
                _told(point, target, beside)
                for point, beside in zip_longest(points, curves[PAIRS][: len(points)])
            ],
            "reached": together,
            "reached by seed": reached,
        }
    found["losses"] = _losses(parts)
    if "people" in parts[0][1]:
        found["people"] = _people(parts)
    found["cpu_seconds"] = round(sum(part["cpu_seconds"] for _, part in parts))
    return found


def _ways(parts: Parts) -> list[str]:
    return [way for way in WAYS if way in parts[0][1]["curves"]]


def _points(parts: Parts, way: str) -> list[dict[str, Any]]:
    """Of each size its mean cost and its accuracies [seeds, prompts]."""
    lengths = {len(part["curves"][way]) for _, part in parts}
    assert len(lengths) == 1, (way, lengths)
    found = []
    for n in range(lengths.pop()):
        of = [(seed, part["curves"][way][n]) for seed, part in parts]
        cost = np.mean([point["cost"] for _, point in of], axis=0).tolist()
        found.append({"cost": cost, "values": by_seed((s, p["accuracy"]) for s, p in of)})
    return found


def by_seed(values: Iterable[tuple[int, Mapping[str, float]]]) -> Floats:
    """[seeds, prompts] of values by prompt, a seed's folds put together.

    >>> by_seed([(0, {"a": 1.0}), (1, {"b": 0.0}), (0, {"b": 0.5}), (1, {"a": 0.25})]).tolist()
    [[1.0, 0.5], [0.25, 0.0]]
    """
    rows: dict[int, dict[str, float]] = {}
    for seed, of in values:
        rows.setdefault(seed, {}).update(of)
    prompts = list(rows[min(rows)])
    return np.array([[rows[seed][prompt] for prompt in prompts] for seed in sorted(rows)])


def reach(points: Sequence[tuple[float, float]], goal: float) -> float | None:
    """The cost at which a curve of (cost, accuracy) first has the goal, between two points by the
    logarithm of the cost; None where it never has.

    >>> round(reach([(16, 0.5), (64, 0.7)], 0.6))
    32
    """
    before = None
    for cost, accuracy in points:
        if accuracy >= goal:
            if before is None:
                return cost
            share = (goal - before[1]) / (accuracy - before[1])
            return exp(log(before[0]) + share * (log(cost) - log(before[0])))
        before = cost, accuracy
    return None


def _interval(values: Floats) -> Interval:
    """The mean over prompts and seeds."""
    return estimate(values.mean(0), runs=[values]).interval()


def _difference(values: Floats, others: Floats) -> dict[str, float] | None:
    """The mean difference of two ways; None of a way with itself."""
    if values.shape == others.shape and (values == others).all():
        return None
    return asdict(estimate(values.mean(0) - others.mean(0), runs=[values, others]).interval())


def _told(
    point: Mapping[str, Any], target: Floats, beside: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A point, less what all random pairs reach, and less random pairs of as many judgements, which
    stand at the same place, but for those that three do not divide.
    """
    values, cost = point["values"], point["cost"]
    alike = beside is not None and abs(beside["cost"][0] - cost[0]) < 3
    return {
        "cost": cost,
        "accuracy": asdict(_interval(values)),
        "less target": _difference(values, target),
        "less random": _difference(values, beside["values"]) if beside and alike else None,
    }


def _losses(parts: Parts) -> dict[str, Any]:
    """Each loss on the same rankings: accuracy, the difference to "pairs", seconds of a fit."""
    values = {
        loss: by_seed((seed, part["losses"][loss]["accuracy"]) for seed, part in parts)
        for loss in parts[0][1]["losses"]
    }
    return {
        loss: {
            "accuracy": asdict(_interval(own)),
            "less pairs": _difference(own, values["pairs"]),
            "cpu_seconds": fmean(part["losses"][loss]["cpu_seconds"] for _, part in parts),
        }
        for loss, own in values.items()
    }


def _people(parts: Parts) -> dict[str, Any]:
    model, person = (
        by_seed((seed, part["people"][who]) for seed, part in parts) for who in ("model", "person")
    )
    return {
        "model": asdict(_interval(model)),
        "person": asdict(_interval(person)),
        "model less person": _difference(model, person),
        "prompts": model.shape[1],
    }


# --- shown ---------------------------------------------------------------------------------------


def tables(found: Mapping[str, Any]) -> list[str]:
    """Of each set: the points, judgements to the target, losses, people."""
    lines = []
    for name, of in found.items():
        lines += [f"{name}: all random pairs {_percent(of['target'])}, {of['cpu_seconds']} CPU s"]
        lines += [
            "| way | "
            + " | ".join(COUNTS)
            + " | accuracy | less all random | less as many random |"
        ]
        for way, own in of["ways"].items():
            for point in own["points"]:
                costs = " | ".join(f"{cost:,.0f}" for cost in point["cost"])
                names = {"accuracy": "", "less target": "+", "less random": "+"}
                shown = " | ".join(_percent(point[name], sign) for name, sign in names.items())
                lines.append(f"| {way} | {costs} | {shown} |")
        lines.append("| way | " + " | ".join(f"{count} to it (by seed)" for count in COUNTS) + " |")
        for way, own in of["ways"].items():
            cells = [
                f"{_count(own['reached'][c])} ({', '.join(map(_count, own['reached by seed'][c]))})"
                for c in COUNTS
            ]
            lines.append(f"| {way} | " + " | ".join(cells) + " |")
        for loss, own in of["losses"].items():
            shown = f"{_percent(own['accuracy'])} | {_percent(own['less pairs'], '+')}"
            lines.append(f"| {loss} | {shown} | {own['cpu_seconds']:.2f} CPU s |")
        if "people" in of:
            told = of["people"]
            lines += [f"| {who} | {_percent(told[who])} |" for who in told if who != "prompts"]
    return lines


def _percent(interval: Mapping[str, float] | None, sign: str = "") -> str:
    if interval is None:
        return "–"
    mean, low, high = (100 * interval[key] for key in ("mean", "low", "high"))
    return f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def _count(number: float | None) -> str:
    return "never" if number is None else f"{number:,.0f}"


def draw(found: Mapping[str, Any], target: Path) -> None:
    """A panel a set: accuracy against judgements, with intervals; rankings also by comparisons."""
    with rc_context({"svg.hashsalt": "prefloop", "font.size": 9}):
        figure = Figure(figsize=(11, 4), layout="constrained")
        panels = figure.subplots(1, len(found))
        for axes, (name, of) in zip(panels, found.items(), strict=True):
            _panel(axes, name, of)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, metadata={"Date": None})


def _panel(axes: Axes, name: str, of: Mapping[str, Any]) -> None:
    axes.set_title(name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("judgements")
    axes.set_ylabel("held-out pairs ordered right, %")
    axes.grid(alpha=0.25)
    axes.axhline(100 * of["target"]["mean"], color=COLOURS[PAIRS], linewidth=0.8, linestyle=":")
    for way, own in of["ways"].items():
        points, colour = own["points"], COLOURS[way]
        mean, low, high = (
            [100 * point["accuracy"][key] for point in points] for key in ("mean", "low", "high")
        )
        costs = [[point["cost"][n] for point in points] for n in range(len(COUNTS))]
        axes.plot(costs[0], mean, "o-", color=colour, label=way, markersize=3, linewidth=1.2)
        axes.fill_between(costs[0], low, high, color=colour, alpha=0.1, linewidth=0)
        if way == RANKINGS:
            label = "the same, by comparisons that sort"
            axes.plot(costs[2], mean, "o--", color=colour, label=label, markersize=2, linewidth=0.8)
