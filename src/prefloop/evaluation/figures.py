"""The drawings of the report pages: SVG that takes its colours from the page it stands in."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prefloop.evaluation.comparison import Comparison, Point, RunRecord
from prefloop.intervals import Interval
from prefloop.terminal import shown

INK = "#123457"  # stands in figures for the page's text colour
COLOURS = ("#a00001", "#a00002", "#a00003", "#a00004", "#a00005", "#a00006", "#a00007")
"""They stand for the page's colours `--c0` to `--c6`, which differ in light and dark."""
CURVES = {  # of metrics.jsonl, by command: metric and title; held-out values are drawn with them
    "sft": (("loss", "SFT: loss (nats a token)"),),
    "reward": (
        ("accuracy", "Reward model: pairs ordered right"),
        ("loss", "Reward model: loss (nats)"),
    ),
    "ppo": (
        ("objective/scores", "PPO: score of the answers it learns from"),
        ("monitor/score", "PPO: monitor's score"),
        ("objective/kl", "PPO: KL to the start (nats an answer)"),
        ("objective/entropy", "PPO: entropy (nats an answer)"),
        ("length_mean", "PPO: tokens an answer"),
        ("val/explained_variance", "PPO: explained variance of the critic"),
    ),
    "dpo": (
        ("loss", "DPO: loss (nats)"),
        ("rewards/accuracies", "DPO: pairs ordered right"),
        ("rewards/margins", "DPO: margin of implicit rewards"),
        ("monitor/score", "DPO: monitor's score"),
    ),
}
BINS = 300
"""A curve of more points keeps the lowest and the highest of each of so many parts."""

SHAPES = ("o", "s", "D")
"""Matplotlib's; the page has the same marks: `shape-0` to `shape-2`."""
INSIDE = 6  # names in a drawing; more stand below it
SIZE = (4.7, 3.1)  # inches
LABEL = 44  # characters of a name in a figure

Draw = Callable[[Axes], None]
Points = tuple[Sequence[int], Sequence[float]]
"""Steps and values."""


@dataclass(frozen=True)
class Picture:
    """A drawing with its title, not yet drawn."""

    title: str
    draw: Draw

    def svg(self, number: int) -> str:
        """An SVG element: text in the page's font and colour, ids of its own by the number."""
        style: Any = {"svg.fonttype": "none", "svg.hashsalt": "prefloop", "font.size": 11}
        for part in ("text.color", "axes.edgecolor", "axes.labelcolor"):
            style[part] = INK
        style |= {"xtick.color": INK, "ytick.color": INK}
        with rc_context(style):
            drawn = Figure(figsize=SIZE, layout="constrained")
            axes = drawn.add_subplot()
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.2, color=INK, linewidth=0.6)
            self.draw(axes)
            legend = axes.get_legend()
            if legend and len(legend.get_texts()) > INSIDE:
                legend.remove()
                _put_below(drawn, axes)
            axes.set_title(_label(self.title), fontsize=11, loc="left")
            out = io.StringIO()
            drawn.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        svg = out.getvalue()
        svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
        for number_of_colour, colour in enumerate(COLOURS):
            svg = svg.replace(colour, f"var(--c{number_of_colour})")
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1f{number}-", svg)
        svg = re.sub(r"font: [^;\"]*?(\d+(?:\.\d+)?)px[^;\"]*", r"font-size: \1px", svg)
        svg = re.sub(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" VIEW>', svg, count=1)
        return svg.replace("VIEW", f'role="img" aria-label="{html.escape(self.title)}"', 1)


def _put_below(drawn: Figure, axes: Axes) -> None:
    """The names under the drawing, which many of them would cover."""
    handles, names = axes.get_legend_handles_labels()
    columns = max(1, min(4, 56 // (max(map(len, names)) + 6)))  # 56 characters are a line
    drawn.set_size_inches(SIZE[0], SIZE[1] + 0.2 * -(-len(names) // columns))
    look: Any = {"loc": "outside lower center", "frameon": False, "fontsize": 9}
    drawn.legend(handles, names, ncols=columns, **look)


def _label(name: str) -> str:
    """A name as a figure's text, one line that leaves room for the drawing.

    matplotlib sets `$` as formulas and leaves out what begins `_`.
    """
    text = " ".join(shown(name).split())
    text = (text if len(text) <= LABEL else f"{text[: LABEL - 1]}…").replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


# --- curves over steps ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """What has one colour in every figure: a run, or runs that differ in the seed alone."""

    name: str
    runs: tuple[RunRecord, ...]
    colour: str


def smoothed(values: Sequence[float], span: float) -> list[float]:
    """Exponential moving average of weight 2/(span + 1), without a bias towards its start.

    s_t = sum_i (1-a)^(t-i) x_i / sum_i (1-a)^(t-i) over i <= t.

    >>> smoothed([0.0, 3.0], span=3)
    [0.0, 2.0]
    """
    keep, total, weight, found = 1 - 2 / (span + 1), 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        found.append(total / weight)
    return found


def thinned(points: Points, bins: int = BINS) -> tuple[list[int], list[float]]:
    """At most two points a bin: its lowest and its highest, in their order."""
    steps, values = points
    if len(steps) <= 2 * bins:
        return list(steps), list(values)
    kept: list[int] = []
    for part in range(bins):
        inside = range(len(steps) * part // bins, len(steps) * (part + 1) // bins)
        lowest = min(inside, key=lambda i: values[i])
        highest = max(inside, key=lambda i: values[i])
        kept += sorted({lowest, highest})
    return [steps[i] for i in kept], [values[i] for i in kept]


def band(runs: Sequence[Points]) -> tuple[list[int], list[float], list[float], list[float]]:
    """Mean, lowest and highest of several runs at each step that all of them have."""
    by_step = [dict(zip(*run, strict=True)) for run in runs]
    steps = sorted(set.intersection(*(set(run) for run in by_step)))
    rows = [[run[step] for run in by_step] for step in steps]
    return steps, [sum(r) / len(r) for r in rows], [min(r) for r in rows], [max(r) for r in rows]


def curves(series: Sequence[Series]) -> list[Picture]:
    """The figures that say most of each command's training; those whose metric was logged."""
    found = []
    for command, wanted in CURVES.items():
        own = [one for one in series if one.runs[0].command == command]
        found += [_curve(own, metric, title) for metric, title in wanted if _has(own, metric)]
    return found


def other_curves(series: Sequence[Series]) -> list[Picture]:
    """A figure for each further metric of a command, titled by its name in metrics.jsonl."""
    found = []
    for command, wanted in CURVES.items():
        own = [one for one in series if one.runs[0].command == command]
        names = {name for one in own for run in one.runs for name in run.metrics}
        names -= {metric for metric, _ in wanted} | {"monitor/low", "monitor/high"}
        found += [_curve(own, n, f"{command}: {n}") for n in sorted(names) if n[:5] != "eval/"]
    return found


def _has(series: Sequence[Series], metric: str) -> bool:
    return any(metric in run.metrics for one in series for run in one.runs)


def _curve(series: Sequence[Series], metric: str, title: str) -> Picture:
    def draw(axes: Axes) -> None:
        for one in series:
            runs = [run.metrics[metric] for run in one.runs if metric in run.metrics]
            if len(runs) > 1:
                _several(axes, runs, one)
            elif runs:
                _single(axes, runs[0], one)
            for run in one.runs:
                _held_out(axes, run, metric, one.colour)
        if metric == "monitor/score":
            _interval(axes, series)
        axes.set_xlabel("step")
        if len(series) > 1 or len(series[0].runs) > 1:
            axes.legend(frameon=False, fontsize=9)

    return Picture(title, draw)


def _single(axes: Axes, run: Points, one: Series) -> None:
    steps, values = thinned(run)
    smooth = smoothed(run[1], _span(run))
    if smooth != list(run[1]):
        axes.plot(steps, values, color=one.colour, alpha=0.3, linewidth=0.8)
        steps, values = thinned((run[0], smooth))
    mark = "o-" if len(steps) < 12 else "-"
    axes.plot(steps, values, mark, color=one.colour, markersize=3, label=_label(one.name))


def _several(axes: Axes, runs: Sequence[Points], one: Series) -> None:
    smooth = [(run[0], smoothed(run[1], _span(run))) for run in runs]
    for run in smooth:
        axes.plot(*thinned(run), color=one.colour, alpha=0.45, linewidth=0.7)
    steps, mean, low, high = band(smooth)
    axes.fill_between(steps, low, high, color=one.colour, alpha=0.15, linewidth=0)
    label = _label(f"{one.name} ({len(runs)} seeds)")
    axes.plot(*thinned((steps, mean)), color=one.colour, linewidth=2, label=label)


def _span(run: Points) -> float:
    """So many points that a dozen spans make the run; a short one is not smoothed."""
    return max(1.0, len(run[0]) / 12)


def _held_out(axes: Axes, run: RunRecord, metric: str, colour: str) -> None:
    steps, values = run.metrics.get(f"eval/{metric}", ([], []))
    before = run.record.get("held_out_before", {}).get(metric)
    if before is not None:
        steps, values = [0, *steps], [before, *values]
    if steps:
        axes.plot(steps, values, "D:", color=colour, markersize=5, linewidth=1, label="_")


def _interval(axes: Axes, series: Sequence[Series]) -> None:
    """The monitor's 95 % interval, of runs that stand alone."""
    for one in series:
        names = ("monitor/low", "monitor/high")
        if len(one.runs) == 1 and all(name in one.runs[0].metrics for name in names):
            (steps, low), (_, high) = (one.runs[0].metrics[name] for name in names)
            axes.fill_between(steps, low, high, color=one.colour, alpha=0.15, linewidth=0)


# --- of comparisons ------------------------------------------------------------------------------


def colours(comparison: Comparison) -> dict[str, str]:
    """A colour for each way, the same in all figures."""
    named = [way.name for way in comparison.ways]
    return dict(zip(named, cycle(COLOURS), strict=False))


def shapes(comparison: Comparison) -> list[int]:
    """Which of SHAPES each way has beside its colour: another where colours come again."""
    return [number // len(COLOURS) % len(SHAPES) for number in range(len(comparison.ways))]


def training_series(comparison: Comparison) -> list[Series]:
    """The runs behind the ways, and the reward model's."""
    colour = colours(comparison)
    found = []
    for way in comparison.ways:
        runs = tuple(one.run for one in (way.runs or (way,)) if one.run)
        if runs:
            found.append(Series(way.name, runs, colour[way.name]))
    if comparison.reward_run:
        found.append(Series("Reward model", (comparison.reward_run,), COLOURS[-1]))
    return found


def reward_against_kl(comparison: Comparison) -> list[Picture]:
    """By the judge: each way with its intervals, the line of best-of-n, and checkpoints that a
    monitor scored. By what the runs were trained on: their checkpoints.
    """
    colour = colours(comparison)

    def judged(axes: Axes) -> None:
        for way, shape in zip(comparison.ways, shapes(comparison), strict=True):
            gold, kl, x = way.vitals.gold, way.vitals.kl, max(way.vitals.kl.mean, 0.0)
            sides = [[max(0.0, x - max(kl.low, 0.0))], [max(0.0, kl.high - x)]]
            heights = [[gold.mean - gold.low], [gold.high - gold.mean]]
            look: Any = {"fmt": SHAPES[shape], "color": colour[way.name], "capsize": 3}
            axes.errorbar([x], [gold.mean], heights, sides, label=_label(way.name), **look)
        for name, points in _by_run(comparison):
            scored = [(point.kl, point.gold.mean) for point in points if point.gold]
            _path(axes, scored, colour[name])
        if comparison.frontier:
            _, kls, golds = zip(*comparison.frontier, strict=True)
            axes.plot(kls, golds, "--", color=INK, alpha=0.6, label="best of 1, 2, … n")
        _against_kl(axes, "judge's score")

    def trained(axes: Axes) -> None:
        for way, points in _by_run(comparison):
            scored = [(point.kl, point.proxy) for point in points if point.proxy is not None]
            _path(axes, scored, colour[way], way if points[0].run == 1 else "_")
        _against_kl(axes, "score that it was trained on")

    pictures = [Picture("Judge's score against KL from SFT", judged)]
    if any(point.proxy is not None for point in comparison.checkpoints):
        pictures.append(Picture("Reward in training against KL from its start", trained))
    return pictures


def proxy_and_gold(comparison: Comparison) -> list[Picture]:
    """For each run that has both: the score that it was trained on, and the monitor's."""
    colour = colours(comparison)
    found = []
    for way, points in _by_run(comparison):
        proxy = [(point.step, point.proxy) for point in points if point.proxy is not None]
        gold = [(point.step, point.gold) for point in points if point.gold]
        if proxy and gold:
            several = sum(
                one.way == way and one.step == points[0].step for one in comparison.checkpoints
            )
            title = f"{way} {points[0].run}" if several > 1 else way
            found.append(Picture(title, _parting(proxy, gold, colour[way])))
    return found


def _parting(
    proxy: Sequence[tuple[int, float]], gold: Sequence[tuple[int, Interval]], colour: str
) -> Draw:
    def draw(axes: Axes) -> None:
        axes.plot(*zip(*proxy, strict=True), "--", color=colour, label="trained on (proxy)")
        steps = [step for step, _ in gold]
        low, high = [g.low for _, g in gold], [g.high for _, g in gold]
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        means = [g.mean for _, g in gold]
        axes.plot(steps, means, "o-", color=colour, markersize=3, label="not trained on (gold)")
        axes.set_xlabel("step")
        axes.legend(frameon=False, fontsize=9)

    return draw


def calibration(comparison: Comparison) -> list[Picture]:
    """How often the reward model orders two answers as the judge does, by how sure it is."""
    found = comparison.calibration
    if found is None:
        return []

    def draw(axes: Axes) -> None:
        expected = [one.expected for one in found.pairs.bins]
        right = [one.accuracy for one in found.pairs.bins]
        axes.plot([0.5, 1], [0.5, 1], ":", color=INK, alpha=0.6, label="as sure as right")
        axes.plot(expected, right, "o-", color=COLOURS[0], label="pairs of sampled answers")
        if found.ceiling:
            low, high = found.ceiling
            axes.axhspan(low, high, color=COLOURS[2], alpha=0.2, label="ceiling of its labels")
        if found.held_out_accuracy is not None:
            style: Any = {"color": COLOURS[1], "linestyle": "--"}
            axes.axhline(found.held_out_accuracy, label="on its held-out labels", **style)
        axes.set_xlabel("share that it expects to have right")
        axes.set_ylabel("share that it has right")
        axes.legend(frameon=False, fontsize=9)

    return [Picture("Reward model: as sure as it is right?", draw)]


def _by_run(comparison: Comparison) -> list[tuple[str, list[Point]]]:
    """The checkpoints of each run of each way."""
    found: dict[tuple[str, int], list[Point]] = {}
    for point in comparison.checkpoints:
        found.setdefault((point.way, point.run), []).append(point)
    return [(way, points) for (way, _), points in found.items()]


def _path(axes: Axes, points: Sequence[tuple[float, float]], colour: str, name: str = "_") -> None:
    if points:
        look: Any = {"color": colour, "markersize": 2.5, "linewidth": 0.8, "alpha": 0.7}
        label = name if name == "_" else _label(name)
        axes.plot(*zip(*points, strict=True), "o-", label=label, **look)


def _against_kl(axes: Axes, what: str) -> None:
    axes.set_xlim(left=-0.02)
    axes.set_xscale("symlog", linthresh=1.0)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("KL (nats an answer; logarithmic above 1)")
    axes.set_ylabel(what)
    axes.legend(frameon=False, fontsize=9)
