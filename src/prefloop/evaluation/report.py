"""The report of a comparison: one self-contained HTML page, and the same table for the terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Table

from prefloop.evaluation.comparison import Comparison, RunRecord, Way
from prefloop.terminal import as_is, shown

INK = "#123457"  # stands in figures for the page's text colour
COLOURS = ("#3b7dd8", "#e07a1f", "#2f9e62", "#c8447e", "#8a63d2", "#8d7b1d", "#159aa8")
CURVES = {  # of metrics.jsonl, by command: metric and title
    "sft": (("loss", "SFT: loss (nats a token)"),),
    "reward": (("accuracy", "Reward model: pairs ordered right"),),
    "ppo": (
        ("objective/scores", "PPO: reward model's score"),
        ("objective/kl", "PPO: KL to the start (nats)"),
    ),
    "dpo": (
        ("rewards/accuracies", "DPO: pairs ordered right"),
        ("rewards/margins", "DPO: margin of implicit rewards"),
    ),
}


# --- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column of the table: heading, what it says in a sentence, and a way's cell."""

    heading: str
    meaning: str
    cell: Callable[[Way], str]


def columns(comparison: Comparison) -> list[Column]:
    """The columns of the main table, for page and terminal."""
    judge = comparison.settings.get("judge", "the judge")
    chosen = [
        Column(
            "Judge",
            f"Mean score by {judge}, with its 95 % interval (bootstrap over prompts).",
            lambda w: str(w.vitals.gold),
        ),
        Column(
            "Wins vs SFT",
            "Share of answers that the judge scores above SFT's to the same prompt, ties half.",
            lambda w: str(w.win_rate) if w.win_rate else "–",
        ),
        Column(
            "RM",
            "Mean score by the reward model that PPO was trained on: the proxy of the judge.",
            lambda w: str(w.vitals.proxy) if w.vitals.proxy else "–",
        ),
        Column(
            "KL",
            "KL divergence from SFT in nats an answer, from log-probs of the model's own answers; "
            "best-of-n's is the bound log n − (n−1)/n.",
            lambda w: f"≤ {w.vitals.kl.mean:.2f}" if w.kl_is_bound else str(w.vitals.kl),
        ),
        Column("Tokens", "Mean length of an answer.", lambda w: f"{w.vitals.length:.1f}"),
        Column(
            "Cut",
            "Share of answers cut at the length limit, for want of a stop token.",
            lambda w: f"{w.vitals.truncated:.0%}",
        ),
        Column(
            "Distinct-2",
            "Distinct over all pairs of neighbouring tokens in one answer to each prompt.",
            lambda w: f"{w.vitals.distinct_2:.2f}",
        ),
        Column(
            "Signs of reward hacking",
            "Rules that fired against SFT's numbers, with theirs.",
            lambda w: "; ".join(f"{s.name} ({s.text})" for s in w.signs) or "none",
        ),
    ]
    has_proxy = any(way.vitals.proxy for way in comparison.ways)
    return [column for column in chosen if has_proxy or column.heading != "RM"]


def cost_rows(comparison: Comparison) -> list[list[str]]:
    """What each run cost, and an answer of each way: name, CPU s, wall s, GiB, tokens, CPU s."""
    named = [(way.name, way.run, way.cpu_seconds_per_answer) for way in comparison.ways]
    listed: list[tuple[str, RunRecord | None, float | None]] = [*named]
    if comparison.reward_run:
        listed.insert(1, ("Reward model", comparison.reward_run, None))
    rows = []
    for name, run, each in listed:
        row = [name, *["–"] * 4]
        if run:
            tokens = "–" if run.tokens is None else f"{run.tokens:,}"
            row[1:] = [f"{run.cpu_seconds:,.0f}", f"{run.wall_seconds:,.0f}"]
            row += [f"{run.peak_memory_gib:.1f}", tokens]
        rows.append([*row, "–" if each is None else f"{each:.2f}"])
    return rows


COST_HEADINGS = (
    "Run",
    "Training, CPU s",
    "Training, wall s",
    "Peak GiB",
    "Tokens trained on",
    "An answer, CPU s",
)


def terminal_table(comparison: Comparison) -> Table:
    """The main table for the terminal: intervals under their means, signs under the table."""
    signs = [f"{w.name}: {s.name} ({s.text})" for w in comparison.ways for s in w.signs]
    caption = "\n".join(
        ["Signs of reward hacking:", *signs] if signs else ["No signs of reward hacking"]
    )
    title = f"{comparison.prompts} held-out prompts"
    layout: dict[str, Any] = {"caption_justify": "left", "box": SIMPLE, "padding": (0, 1)}
    table = Table(title=title, caption=as_is(caption), **layout)
    shown = columns(comparison)[:-1]
    for heading in ("Way", *(column.heading for column in shown)):
        table.add_column(as_is(heading), overflow="fold")
    for way in comparison.ways:
        cells = (column.cell(way).replace(" [", "\n[") for column in shown)
        table.add_row(*map(as_is, (way.name, *cells)))
    return table


# --- figures -------------------------------------------------------------------------------------


def _label(name: str) -> str:
    """A name as a legend's text: matplotlib sets `$` as formulas and leaves out what begins `_`."""
    text = shown(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def figure(draw: Callable[[Axes], None], title: str, number: int, wide: bool = False) -> str:
    """An SVG element for the page: text in the page's font and colour, ids of its own."""
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "prefloop", "font.size": 11}
    for part in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"):
        style[part] = INK
    with rc_context(style):
        drawn = Figure(figsize=(5.8, 3.8) if wide else (4.6, 2.9), layout="constrained")
        axes = drawn.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, color=INK)
        draw(axes)
        if not wide:
            axes.set_title(title, fontsize=11)
        out = io.StringIO()
        drawn.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1f{number}-", svg)
    svg = re.sub(r"font: [^;\"]*?(\d+(?:\.\d+)?)px[^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" VIEW>', svg, count=1)
    return svg.replace("VIEW", f'role="img" aria-label="{title}"', 1)


def _frontier_figure(comparison: Comparison, number: int) -> str:
    def draw(axes: Axes) -> None:
        for way, colour in zip(comparison.ways, cycle(COLOURS), strict=False):
            gold, kl, x = way.vitals.gold, way.vitals.kl, max(way.vitals.kl.mean, 0.0)
            sides = [[max(0.0, x - max(kl.low, 0.0))], [max(0.0, kl.high - x)]]
            heights = [[gold.mean - gold.low], [gold.high - gold.mean]]
            axes.errorbar(
                [x],
                [gold.mean],
                heights,
                sides,
                fmt="o",
                color=colour,
                capsize=3,
                label=_label(way.name),
            )
        if comparison.frontier:
            _, kls, golds = zip(*comparison.frontier, strict=True)
            axes.plot(kls, golds, "--", color=INK, alpha=0.6, label="best of 1, 2, … n")
        axes.set_xlim(left=-0.02)
        axes.set_xscale("symlog", linthresh=1.0)
        axes.set_xlabel("KL from SFT (nats an answer; logarithmic above 1)")
        axes.set_ylabel("Judge's score")
        axes.legend(frameon=False, fontsize=9)

    return figure(draw, "Judge's score against KL from SFT", number, wide=True)


def _curve_figures(comparison: Comparison, start: int) -> list[str]:
    named = [(way.name, way.run) for way in comparison.ways]
    named.append(("Reward model", comparison.reward_run))
    runs = list(zip(named, cycle(COLOURS), strict=False))  # a way has one colour in all figures
    drawn: list[str] = []
    for command, wanted in CURVES.items():
        for metric, title in wanted:
            lines = [
                (name, colour, *run.metrics[metric])
                for (name, run), colour in runs
                if run and run.command == command and metric in run.metrics
            ]
            if lines:
                draw = _lines(lines)
                drawn.append(figure(draw, title, start + len(drawn)))
    return drawn


def _lines(lines: Sequence[tuple[str, str, list[int], list[float]]]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for name, colour, steps, values in lines:
            axes.plot(
                steps, values, "o-" if len(steps) < 3 else "-", color=colour, label=_label(name)
            )
        axes.set_xlabel("step")
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=9)

    return draw


# --- the page ------------------------------------------------------------------------------------


def render(comparison: Comparison) -> str:
    """The whole page as HTML with nothing to load from elsewhere."""
    environment = Environment(
        loader=PackageLoader("prefloop.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        comparison=comparison,
        columns=columns(comparison),
        cost_headings=COST_HEADINGS,
        cost_rows=cost_rows(comparison),
        frontier=_frontier_figure(comparison, 1),
        curves=_curve_figures(comparison, 2),
    )
