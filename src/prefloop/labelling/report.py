"""The quality report as a terminal table, and as a page."""

from __future__ import annotations

from contextlib import closing
from dataclasses import fields
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table

from prefloop.config.labelling import LabelReportConfig
from prefloop.files import write_atomic
from prefloop.labelling.quality import Quality, Record, measure
from prefloop.labelling.store import Store
from prefloop.terminal import as_is

COLUMNS = {  # of a labeller's record
    "name": "Labeller",
    "annotations": "Done",
    "skip_rate": "Skipped",
    "agreement": "Agreement",
    "accuracy": "Accuracy",
    "gold_accuracy": "Gold",
    "gold_pairs": "Gold pairs",
    "consistency": "Consistency",
    "first_wins": "First wins",
    "first_wins_p": "p",
    "seconds": "Seconds",
    "fast": "Fast",
    "flags": "To look at",
}


def run(config: LabelReportConfig) -> Quality:
    """Measure a project; write --output where it is given."""
    with closing(Store(config.store, must_exist=True)) as store:
        quality = measure(store, config.project, config.seed)
    if config.output is not None:
        write_atomic(config.output, html(quality))
    return quality


def facts(q: Quality) -> list[tuple[str, str, str]]:
    """(name, value, meaning) of the project's numbers."""
    flags = ", ".join(f"{name} {count}" for name, count in sorted(q.flagged_answers.items()))
    ceiling = None if q.ceiling is None else "{:.2f} to {:.2f}".format(*q.ceiling)
    place = None if q.first_wins is None else f"{q.first_wins:.2f} (p {_cell(q.first_wins_p)})"
    return [
        ("Annotations", str(q.annotations), f"{q.shared_tasks} tasks have two or more"),
        ("Pair agreement", _cell(q.agreement), "pairs that two labellers order alike, ties half"),
        ("Krippendorff's alpha", _cell(q.alpha), "ordinal; 1 is perfect, 0 is chance"),
        ("Ceiling", _cell(ceiling), "accuracy of a perfect reward model on labels like these"),
        ("First wins", _cell(place), "pairs won by the answer shown earlier; 0.50 without bias"),
        ("Longer wins", _cell(q.longer_wins), "pairs won by the longer answer"),
        ("Skipped", _cell(q.skip_rate), "share of the tasks seen"),
        ("Flags", flags or "–", "on answers"),
    ]


def rows(q: Quality) -> list[list[str]]:
    """A row of cells a labeller."""
    assert list(COLUMNS) == [field.name for field in fields(Record)]
    return [[_cell(getattr(record, name)) for name in COLUMNS] for record in q.labellers]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, tuple):
        return "; ".join(value)
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def terminal(q: Quality) -> Group:
    """The report for the terminal."""
    numbers = Table("", "", "", title=as_is(f"Project {q.project}"), box=SIMPLE, show_header=False)
    for row in facts(q):
        numbers.add_row(*map(as_is, row))
    people = Table(title="Labellers", box=SIMPLE)
    for head in COLUMNS.values():
        people.add_column(head, overflow="fold")
    for cells in rows(q):
        people.add_row(*map(as_is, cells))
    return Group(numbers, people)


def html(q: Quality) -> str:
    """A page that needs no other file."""
    loader = PackageLoader("prefloop.labelling.web")
    environment = Environment(loader=loader, undefined=StrictUndefined, autoescape=True)
    return environment.get_template("report.html").render(context(q))


def context(q: Quality) -> dict[str, object]:
    """What templates need to show the report."""
    return {"q": q, "facts": facts(q), "columns": list(COLUMNS.values()), "rows": rows(q)}
