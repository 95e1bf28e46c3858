"""The frontier of reward and KL of a use that has PPO and DPO at several strengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib import rc_context
from matplotlib.figure import Figure

from prefloop.evaluation.pairs import Scored, mean_of_runs
from prefloop.intervals import Interval


def families(ways: Sequence[str]) -> dict[str, list[str]]:
    """Ways that differ in their strength alone ("DPO 0.1", "DPO 0.3"), by strength, under their
    name; each other way under its own.
    """
    found: dict[str, list[str]] = {}
    for way in ways:
        name, _, strength = way.rpartition(" ")
        family = name if name and strength.replace(".", "", 1).isdigit() else way
        found.setdefault(family, []).append(way)
    return {
        name: sorted(own, key=lambda way: float(way.rpartition(" ")[2])) if len(own) > 1 else own
        for name, own in found.items()
    }


def draw(scored: Sequence[Scored], kl: Mapping[str, Sequence[float]], path: Path) -> None:
    """Each way's mean score with its interval over its mean KL from SFT; writes an SVG file."""
    means: dict[str, Interval] = {one.name: mean_of_runs(one.scores) for one in scored}
    with rc_context({"svg.hashsalt": "prefloop", "font.size": 9}):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
        for family, ways in families([one.name for one in scored]).items():
            gold = [means[way] for way in ways]
            sides = [[g.mean - g.low for g in gold], [g.high - g.mean for g in gold]]
            x, y = [fmean(kl[way]) for way in ways], [g.mean for g in gold]
            line = "o-" if len(ways) > 1 else "s"
            axes.errorbar(x, y, sides, fmt=line, capsize=2, markersize=4, label=family)
            if len(ways) > 1:
                for way, at, height in zip(ways, x, y, strict=True):
                    strength = way.rpartition(" ")[2]
                    axes.annotate(
                        strength, (at, height), (5, -8), textcoords="offset points", fontsize=7
                    )
        axes.set_xlabel("KL from SFT, nats an answer")
        axes.set_ylabel("judge")
        axes.legend(frameon=False, fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None}, facecolor="white")
