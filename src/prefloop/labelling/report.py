"""The quality report as a terminal table, and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import fields, replace
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table

from prefloop.config.labelling import LabelReportConfig
from prefloop.files import write_atomic
from prefloop.labelling.quality import Quality, Record, measure
from prefloop.labelling.store import Store
from prefloop.labelling.web.words import read_words
from prefloop.terminal import as_is

Words = Mapping[str, str]

COLUMNS = tuple(field.name for field in fields(Record))
"""Of a labeller's record; the words of each are `quality-NAME`."""
ENGLISH = read_words()["en"]


def run(config: LabelReportConfig) -> Quality:
    """Measure a project; write --output where it is given."""
    with closing(Store(config.store, must_exist=True)) as store:
        quality = measure(store, config.project, config.seed)
    if config.output is not None:
        write_atomic(config.output, html(quality))
    return quality


def facts(q: Quality, words: Words = ENGLISH) -> list[tuple[str, str, str]]:
    """(name, value, meaning) of the project's numbers."""
    flags = sorted((words.get(name, name), count) for name, count in q.flagged_answers.items())
    ceiling = None if q.ceiling is None else "{:.2f} – {:.2f}".format(*q.ceiling)
    place = None if q.first_wins is None else f"{q.first_wins:.2f} (p {_cell(q.first_wins_p)})"
    shared = words["fact-annotations-meaning"].format(count=q.shared_tasks)
    values = {
        "annotations": str(q.annotations),
        "agreement": _cell(q.agreement),
        "alpha": _cell(q.alpha),
        "ceiling": _cell(ceiling),
        "first": _cell(place),
        "longer": _cell(q.longer_wins),
        "skipped": _cell(q.skip_rate),
        "flags": ", ".join(f"{name} {count}" for name, count in flags) or "–",
    }
    meanings = {name: words[f"fact-{name}-meaning"] for name in values} | {"annotations": shared}
    return [(words[f"fact-{name}"], value, meanings[name]) for name, value in values.items()]


def columns(words: Words = ENGLISH) -> list[str]:
    """The heads of the labellers' table."""
    return [words[f"quality-{name}"] for name in COLUMNS]


def rows(q: Quality, words: Words = ENGLISH) -> list[list[str]]:
    """A row of cells a labeller."""
    told = [
        replace(r, flags=tuple(words.get(f"look-{flag}", flag) for flag in r.flags))
        for r in q.labellers
    ]
    return [[_cell(getattr(record, name)) for name in COLUMNS] for record in told]


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
    for head in columns():
        people.add_column(head, overflow="fold")
    for cells in rows(q):
        people.add_row(*map(as_is, cells))
    return Group(numbers, people)


def html(q: Quality) -> str:
    """A page that needs no other file."""
    loader = PackageLoader("prefloop.labelling.web")
    environment = Environment(loader=loader, undefined=StrictUndefined, autoescape=True)
    return environment.get_template("report.html").render(context(q))


def context(q: Quality, words: Words = ENGLISH) -> dict[str, object]:
    """What templates need to show the report."""
    tables = {"facts": facts(q, words), "columns": columns(words), "rows": rows(q, words)}
    return {"q": q, "words": words, **tables}
