"""What a run's record says, as the cells of tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefloop.card import CONFIGS
from prefloop.config.resolve import default_settings, flag
from prefloop.evaluation.comparison import RunRecord
from prefloop.progress import in_words
from prefloop.resume import FREE_TO_CHANGE

PROVENANCE = ("Run", "Command", "Seed", "Revision", "Versions", "Where", "Started", "Rows")
NOWHERE = "–"


def state(run: RunRecord, is_written: bool) -> str:
    """How far the run is, in a sentence; `is_written`: a process of this machine writes it."""
    record, step = run.record, last_step(run)
    total = record.get("total_steps")
    place = f"step {step:,}" + (f" of {total:,}" if total else "")
    status = record["status"]
    if status == "finished":
        return f"finished: {record['steps']:,} steps in {in_words(run.wall_seconds)}"
    if status != "running":
        return f"{status} after {place}; the same command goes on from its last checkpoint"
    if not is_written:
        return (
            f"ended without a word at {place} (killed?), or running on another machine; the same "
            "command goes on from its last checkpoint"
        )
    if not total or not step:
        return f"running, {place}"
    left = run.wall_seconds / step * (total - step)
    return f"running, {place}, about {in_words(left)} left"


def last_step(run: RunRecord) -> int:
    """The last step that was logged; 0 before the first."""
    return max((steps[-1] for steps, _ in run.metrics.values()), default=0)


def learned_table(runs: Mapping[str, RunRecord]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: each metric before and after, of one run or of several side by side."""
    known = {name: learned(run) for name, run in runs.items()}
    if len(known) == 1:
        [(of, found)] = known.values()
        rows = [[n, f"{a:.4g}", f"{b:.4g}", f"{b - a:+.4g}"] for n, a, b in found]
        return [f"Of {of}", "Before", "After", "Change"], rows
    told = {
        name: {n: f"{a:.4g} → {b:.4g}" for n, a, b in found} for name, (_, found) in known.items()
    }
    metrics = dict.fromkeys(metric for one in told.values() for metric in one)
    headings = ["Metric", *(f"{name}: {of}" for name, (of, _) in known.items())]
    return headings, [[m, *(one.get(m, NOWHERE) for one in told.values())] for m in metrics]


def learned(run: RunRecord) -> tuple[str, list[tuple[str, float, float]]]:
    """Of which rows, and metric, before and after: held-out ones where there are any."""
    before = run.record.get("held_out_before", {})
    found = []
    for name, first in before.items():
        _, values = run.metrics.get(f"eval/{name}", ([], []))
        if first is not None and values:
            found.append((name, first, values[-1]))
    if found:
        return "held-out rows", found
    rows = [
        (name, values[0], values[-1])
        for name, (_, values) in run.metrics.items()
        if len(values) > 1 and not name.startswith(("eval/", "monitor/", *UNTOLD))
    ]
    return "training rows, first and last step", rows


UNTOLD = ("lr", "tokens_per_second", "grad_norm", "val/", "policy/")
"""Metrics that say how training goes rather than what was learned."""


def changed_settings(run: RunRecord) -> list[tuple[str, str, str]]:
    """Setting, value and default, of those that are not their defaults."""
    defaults = default_settings(CONFIGS[run.command])
    return [
        (flag(name), cell(value), cell(defaults.get(name, "(required)")))
        for name, value in run.settings.items()
        if name not in ("output", "resume") and value != defaults.get(name, "")
    ]


def differing_settings(runs: Mapping[str, RunRecord]) -> list[list[str]]:
    """Flag, and each run's value, of the settings of one command in which its runs differ.

    A setting that did not exist when a run began had its default.
    """
    rows = []
    for command in CONFIGS:
        own = {name: run for name, run in runs.items() if run.command == command}
        settings = [default_settings(CONFIGS[command]) | dict(r.settings) for r in own.values()]
        for name in dict.fromkeys(name for one in settings for name in one):
            values = [cell(one.get(name)) for one in settings]
            if name not in ("output", "resume") and len(set(values)) > 1:
                told = dict(zip(own, values, strict=True))
                rows.append([flag(name), *(told.get(run, "") for run in runs)])
    return rows


def cell(value: object) -> str:
    """A setting's value."""
    if value is None or value == "" or value == []:
        return NOWHERE
    if isinstance(value, list):
        return " ".join(map(str, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def provenance_row(name: str, run: RunRecord) -> list[str]:
    """A row of the table of `PROVENANCE`."""
    record = run.record
    versions = ", ".join(f"{k} {v}" for k, v in record.get("versions", {}).items())
    started = record.get("started", NOWHERE).replace("T", " ").replace("+00:00", " UTC")
    resumed = f", resumed {record['resumed']} times" if record.get("resumed") else ""
    return [
        name,
        run.command,
        cell(record.get("seed")),
        cell(record.get("revision")),
        versions or NOWHERE,
        cell(record.get("platform")),
        started + resumed,
        "; ".join(_rows(record, run.settings)) or NOWHERE,
    ]


def _rows(record: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    """What was read of each part of the run's rows, with the files' sha256 where it is known."""
    for of, counts in record.get("rows", {}).items():
        source = cell(settings.get(of) or settings.get("data"))
        dropped = "".join(f", {n} dropped ({why})" for why, n in counts["dropped"].items())
        yield f"{of} {source}: {counts['used']:,} of {counts['read']:,} rows used{dropped}"
    for path, digest in record.get("sha256", {}).items():
        yield f"{path} sha256 {digest}"


def names_of(folders: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart.

    >>> names_of(["a/ppo", "b/ppo"]), names_of(["a/ppo", "a/dpo"])
    (['a/ppo', 'b/ppo'], ['ppo', 'dpo'])
    """
    parts = [Path(folder).resolve().parts for folder in folders]
    depth = 1
    while depth < max(map(len, parts)) and len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def is_like(first: RunRecord, second: RunRecord) -> bool:
    """Whether two runs differ in the seed alone: of folders and files the last names count."""
    return _likeness(first) == _likeness(second)


def _likeness(run: RunRecord) -> tuple[str, dict[str, str]]:
    names = sorted(run.settings.keys() - FREE_TO_CHANGE - {"seed"})
    return run.command, {name: cell(run.settings[name]).rpartition("/")[2] for name in names}
