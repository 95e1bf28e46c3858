"""`prefloop report`: a page of runs, also while they go; or a comparison's page anew."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from prefloop.config.inference import ReportConfig
from prefloop.errors import UserError
from prefloop.evaluation import figures
from prefloop.evaluation.comparison import RunRecord, read_run
from prefloop.evaluation.figures import Series
from prefloop.evaluation.page import Numbered, render_page
from prefloop.evaluation.report import render
from prefloop.evaluation.reread import read_comparison
from prefloop.evaluation.run_facts import (
    NOWHERE,
    PROVENANCE,
    changed_settings,
    differing_settings,
    is_like,
    learned_table,
    names_of,
    provenance_row,
    state,
)
from prefloop.files import check_writable, write_atomic
from prefloop.progress import in_words
from prefloop.runs import is_written

COSTS = ("Run", "Time", "CPU", "Peak memory", "Tokens trained on")


@dataclass(frozen=True)
class Shown:
    """A run on the page."""

    name: str
    run: RunRecord
    is_written: bool  # a process of this machine writes it

    @property
    def is_going(self) -> bool:
        """Whether there will be more to see."""
        return self.is_written and self.run.record["status"] == "running"


def run(config: ReportConfig, wait: Callable[[float], None] = time.sleep) -> Path:
    """Write the page; with `every`, again until the runs have ended. Returns its path."""
    folders = [Path(folder) for folder in config.runs]
    output = config.output or folders[0] / "report.html"
    check_writable(output)
    if (folders[0] / "compare.json").exists():
        if len(folders) > 1 or config.every:
            raise UserError(
                f"{folders[0]} holds a comparison, which stands alone and does not change; give it "
                "without other directories and without --every"
            )
        write_atomic(output, render(*read_comparison(folders[0])))
        return output
    while True:
        shown = _read(folders)
        going = any(one.is_going for one in shown)
        write_atomic(output, render_runs(shown, config.every if going else 0.0))
        if not (config.every and going):
            return output
        wait(config.every)


def _read(folders: Sequence[Path]) -> list[Shown]:
    found = []
    for folder, name in zip(folders, names_of([str(f) for f in folders]), strict=True):
        record = read_run(folder)
        if record is None:
            raise UserError(
                f"{folder}: no run directory (no run.json or compare.json in it); give one"
            )
        found.append(Shown(name, record, is_written(Path(record.folder))))
    return found


def render_runs(shown: Sequence[Shown], refresh: float = 0.0) -> str:
    """The page of one or several runs; `refresh`: seconds after which a browser reads it anew."""
    drawn = Numbered()
    series = series_of(shown)
    runs = {one.name: one.run for one in shown}
    changed = changed_settings(shown[0].run) if len(shown) == 1 else []
    differing = differing_settings(runs)
    curves, others = drawn(figures.curves(series)), drawn(figures.other_curves(series))
    headings, learned = learned_table(runs)
    has_health = any("health" in one.run.record for one in shown)
    sections = [
        ("learned", "What was learned", bool(learned)),
        ("training", "Training", bool(curves or others)),
        ("health", "Health", has_health),
        ("cost", "Cost", True),
        ("settings", "Settings", bool(changed or differing)),
        ("provenance", "Provenance", True),
    ]
    return render_page(
        "runs.html",
        sections=[(name, title) for name, title, has in sections if has],
        refresh=refresh,
        shown=[(one.name, one.run, state(one.run, one.is_written)) for one in shown],
        marks={run.folder: _variable(one.colour) for one in series for run in one.runs},
        learned_headings=headings,
        learned=learned,
        curves=curves,
        others=others,
        has_health=has_health,
        cost_headings=COSTS,
        costs=[_cost(one) for one in shown],
        changed=changed,
        differing=differing,
        provenance_headings=PROVENANCE,
        provenance=[provenance_row(name, run) for name, run in runs.items()],
    )


def series_of(shown: Sequence[Shown]) -> list[Series]:
    """Runs that differ in the seed alone are one series; each other is one by itself."""
    groups: list[list[Shown]] = []
    for one in shown:
        for group in groups:
            seeds = {other.run.record.get("seed") for other in group}
            if is_like(group[0].run, one.run) and one.run.record.get("seed") not in seeds:
                group.append(one)
                break
        else:
            groups.append([one])
    return [
        Series(_joined([o.name for o in group]), tuple(o.run for o in group), colour)
        for group, colour in zip(groups, cycle(figures.COLOURS), strict=False)
    ]


def _joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"


def _variable(colour: str) -> str:
    return f"var(--c{figures.COLOURS.index(colour)})"


def _cost(one: Shown) -> list[str]:
    run = one.run
    tokens = NOWHERE if run.tokens is None else f"{run.tokens:,}"
    times = [in_words(run.wall_seconds), in_words(run.cpu_seconds)]
    return [one.name, *times, f"{run.peak_memory_gib:.1f} GiB", tokens]
