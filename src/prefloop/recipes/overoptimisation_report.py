"""What the study of overoptimisation found: fits, falls from the peak, a table and a figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from prefloop.evaluation import overoptimisation as o
from prefloop.files import atomic_file, write_atomic

BEST_OF_N = "best of n"
COLOURS = ("#3b7dd8", "#c8447e", "#2f9e62", "#e07a1f")  # of the ways
Rows = Sequence[Mapping[str, Any]]
HEADINGS = (
    "labels",
    "way",
    "KL at the end",
    "proxy at the end",
    "gold: start, peak, end",
    "fall, standard errors",
    "gold's α, β",
    "KL of the peak by the fit",
)


def write_report(rows: Rows, folder: Path) -> dict[str, Any]:
    """Writes summary.json, table.md and overoptimisation.svg; returns the summary."""
    groups = grouped(rows)
    summary = {"groups": [summed_up(*group) for group in groups]}
    write_atomic(folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    write_atomic(folder / "table.md", table(summary["groups"]))
    draw(groups, folder / "overoptimisation.svg")
    return summary


Group = tuple[int, str, list[list[Mapping[str, Any]]]]
"""Labels, way, and the rows of each repeat, in order."""


def grouped(rows: Rows) -> list[Group]:
    """The rows by label-set size and way, in the order in which they come."""
    found: dict[tuple[int, str], dict[int, list[Mapping[str, Any]]]] = {}
    for row in rows:
        repeats = found.setdefault((row["labels"], row["way"]), {})
        repeats.setdefault(row["repeat"], []).append(row)
    return [(labels, way, list(repeats.values())) for (labels, way), repeats in found.items()]


def points_of(rows: Rows) -> list[o.Point]:
    """The rows' points."""
    return [o.Point(row["kl"], row["proxy"], row["gold"], row["error"]) for row in rows]


def summed_up(labels: int, way: str, repeats: list[list[Mapping[str, Any]]]) -> dict[str, Any]:
    """One entry of the summary: the fits over all repeats, and each repeat's fall."""
    form: o.Form = "best-of-n" if way == BEST_OF_N else "rl"
    runs = [points_of(rows) for rows in repeats]
    draw = _draw_choices(repeats) if form == "best-of-n" else o.draw_runs(runs)
    every = [point for run in runs for point in run]
    both: tuple[o.Reward, ...] = ("gold", "proxy")
    fits = {of: asdict(o.fit_with_intervals(every, form, of, draw)) for of in both}
    ends = [o.windows(run)[-1] for run in runs] if form == "rl" else [run[-1] for run in runs]
    falls = [o.fall(run) for run in runs] if form == "rl" else []
    return {
        "labels": labels,
        "way": way,
        "repeats": len(runs),
        "start": [(o.windows(run)[0] if form == "rl" else run[0]).gold for run in runs],
        "end": [asdict(end) for end in ends],
        "falls": [asdict(one) | {"standard_errors": one.standard_errors} for one in falls],
        "fits": fits,
    }


def _draw_choices(repeats: list[list[Mapping[str, Any]]]) -> o.Draw:
    """Repeats are drawn again, and in all of them the same prompts: their answers are the same."""
    proxies, golds = (
        np.array([[row[name] for row in rows] for rows in repeats])  # [repeats, n, prompts]
        for name in ("proxies", "golds")
    )

    def draw(rng: np.random.Generator, count: int) -> o.Resamples:
        parts = []
        for times in rng.multinomial(len(repeats), np.full(len(repeats), 1 / len(repeats)), count):
            means = (np.average(scores, 0, times) for scores in (proxies, golds))
            one = o.draw_prompts(*means)(rng, 1)
            # the points of the fit are those of all repeats; each resample is their mean
            parts.append(o.Resamples(*(np.tile(part, (1, len(repeats))) for part in one)))
        return o.Resamples(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    return draw


def table(groups: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table: means over the repeats, and each repeat's fall."""
    lines = [HEADINGS, ("---",) * len(HEADINGS)]
    for one in groups:
        ends, falls, fit = one["end"], one["falls"], one["fits"]["gold"]
        start, end = _mean(one["start"]), _mean([e["gold"] for e in ends])
        peak = f"{_mean([f['peak'] for f in falls]):.2f}" if falls else "–"
        alpha, beta = (_with_interval(fit[name]) for name in ("alpha", "beta"))
        lines.append(
            (
                str(one["labels"]),
                one["way"],
                f"{_mean([e['kl'] for e in ends]):.1f}",
                f"{_mean([e['proxy'] for e in ends]):.2f}",
                f"{start:.2f}, {peak}, {end:.2f}",
                " · ".join(f"{f['standard_errors']:.1f}" for f in falls) or "–",
                f"{alpha}, {beta}",
                "none" if fit["peak_kl"] is None else _with_interval(fit["peak_kl"], 1),
            )
        )
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _with_interval(interval: Mapping[str, float], digits: int = 2) -> str:
    mean, low, high = (f"{interval[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def draw(groups: Sequence[Group], path: Path) -> None:
    """Gold above, proxy below, against sqrt(KL); a column for each size of label set."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    sizes = list(dict.fromkeys(labels for labels, _, _ in groups))
    ways = list(dict.fromkeys(way for _, way, _ in groups))
    names = (("gold", "gold reward"), ("proxy", "proxy, deviations of SFT's"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "prefloop", "font.size": 9}):
        drawn = Figure(figsize=(3.4 * len(sizes), 5.6), layout="constrained")
        axes = drawn.subplots(2, len(sizes), squeeze=False, sharex="col", sharey="row")
        for labels, way, repeats in groups:
            colour = COLOURS[ways.index(way)]
            for row, (of, _) in enumerate(names):
                one = axes[row][sizes.index(labels)]
                _draw_way(one, way, [points_of(rows) for rows in repeats], of, colour)
        for column, labels in enumerate(sizes):
            axes[0][column].set_title(f"{labels} ranked prompts")
            axes[1][column].set_xlabel("√KL from SFT (√nats an answer)")
        for row, (_, label) in enumerate(names):
            axes[row][0].set_ylabel(label)
        axes[0][0].legend(frameon=False, fontsize=8)
        with atomic_file(path) as out:
            drawn.savefig(out, format="svg", metadata={"Date": None})


def _draw_way(axes: Any, way: str, runs: Sequence[Sequence[o.Point]], of: Any, colour: str) -> None:
    """Each run's windows as thin lines, the fit over all runs as a thick one."""
    form: o.Form = "best-of-n" if way == BEST_OF_N else "rl"
    for run in runs:
        shown = o.windows(run) if form == "rl" else run
        x = [max(point.kl, 0.0) ** 0.5 for point in shown]
        axes.plot(x, [getattr(point, of) for point in shown], color=colour, alpha=0.35, lw=0.8)
    every = [point for run in runs for point in run]
    curve = o.fit(every, form, of)
    d = np.linspace(0, max(max(point.kl, 0.0) for point in every) ** 0.5, 60)
    axes.plot(d, [curve.at(float(x) ** 2) for x in d], color=colour, lw=1.8, label=way)
