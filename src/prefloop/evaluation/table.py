"""The tables of a comparison, for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from prefloop.evaluation.comparison import Comparison, RunRecord, Way
from prefloop.terminal import as_is


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
