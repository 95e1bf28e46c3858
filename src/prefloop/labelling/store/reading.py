"""Statements that only read: what the report, the export and the admin's page look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, and_, exists, func, select, text

from prefloop.labelling.store.schema import (
    annotation_rows,
    assignments,
    day_sums,
    events,
    labellers,
    members,
    projects,
    prompts,
    responses,
    snapshots,
    tasks,
)
from prefloop.labelling.store.transaction import Transaction, seen_by

_not_expired = assignments.c.state != "expired"
MANY = 1000
"""Tasks that lack labellers are counted up to here."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """The newest version of what a labeller says of a task."""

    task_id: int
    kind: str  # real, gold, repeat, practice
    prompt_id: int
    response_ids: Sequence[int]
    gold_tiers: Sequence[Sequence[int]] | None
    repeat_of: int | None
    labeller: str
    shown: Sequence[int]
    strategy: str
    version: int
    tiers: Sequence[Sequence[int]] | None  # None: skipped
    ratings: Sequence[int] | None
    strength: int | None
    confidence: int | None
    all_bad: bool
    flags: Sequence[Mapping[str, Any]]
    comment: str
    seconds: float
    created: float
    project_version: int | None  # which guidelines the page showed


def annotations_of(
    t: Transaction, project_id: int, task_id: int | None = None, *, every_version: bool = False
) -> Iterator[Annotation]:
    """A project's annotations (or one task's) in the order of tasks, newest version only."""
    wanted = annotation_rows.c.assignment_id == assignments.c.id
    if not every_version:
        wanted = and_(wanted, annotation_rows.c.version == assignments.c.version)
    said, task = annotation_rows.c, tasks.c
    columns: tuple[Any, ...] = (
        *(task.id, task.kind, task.prompt_id, task.response_ids, task.gold_tiers, task.repeat_of),
        *(labellers.c.name, assignments.c.shown, assignments.c.strategy, said.version),
        *(said.tiers, said.ratings, said.strength, said.confidence, said.all_bad, said.flags),
        *(said.comment, said.seconds, said.created, said.project_version),
    )
    query: Select[Any] = (
        select(*columns)
        .join(assignments, assignments.c.task_id == task.id)
        .join(annotation_rows, wanted)
        .join(labellers, labellers.c.id == assignments.c.labeller_id)
        .where(task.project_id == project_id)
        .order_by(task.id, assignments.c.id, said.version)
    )
    if task_id is not None:
        query = query.where(task.id == task_id)
    rows = t.connection.execution_options(yield_per=5000).execute(query)
    for row in rows:
        yield Annotation(*row)


def prompts_of(t: Transaction, project_id: int) -> dict[int, tuple[Any, Any]]:
    """(prompt, the row's other columns) by id."""
    query: Select[Any] = select(prompts.c.id, prompts.c.prompt, prompts.c.extra)
    rows = t.connection.execute(query.where(prompts.c.project_id == project_id))
    return {row[0]: (row[1], row[2]) for row in rows}


def unanswered_of(t: Transaction, project_id: int) -> list[tuple[Any, Any]]:
    """(prompt, the row's other columns) of prompts that have no response, oldest first."""
    query: Select[Any] = (
        select(prompts.c.prompt, prompts.c.extra)
        .outerjoin(responses, responses.c.prompt_id == prompts.c.id)
        .where(and_(prompts.c.project_id == project_id, responses.c.id.is_(None)))
        .order_by(prompts.c.id)
    )
    return [(row[0], row[1]) for row in t.connection.execute(query)]


def responses_of(t: Transaction, project_id: int) -> dict[int, Mapping[str, Any]]:
    """What is known of each response, by id."""
    columns: tuple[Any, ...] = (responses, snapshots.c.model, snapshots.c.weights)
    query = (
        select(*columns)
        .join(prompts, prompts.c.id == responses.c.prompt_id)
        .outerjoin(snapshots, snapshots.c.id == responses.c.snapshot_id)
        .where(prompts.c.project_id == project_id)
    )
    return {row["id"]: row for row in t.all(query)}


def lengths_of(t: Transaction, project_id: int) -> dict[int, int]:
    """Characters of each response, by id."""
    query: Select[Any] = (
        select(responses.c.id, responses.c.completion)
        .join(prompts, prompts.c.id == responses.c.prompt_id)
        .where(prompts.c.project_id == project_id)
    )
    rows = t.connection.execution_options(yield_per=5000).execute(query)
    return {row[0]: sum(map(len, _texts(row[1]))) for row in rows}


def texts_of(t: Transaction, prompt_id: int, response_ids: Sequence[int]) -> tuple[Any, list[Any]]:
    """A prompt and some of its responses, as JSON."""
    prompt = t.connection.execute(select(prompts.c.prompt).where(prompts.c.id == prompt_id))
    query: Select[Any] = select(responses.c.id, responses.c.completion)
    rows = t.connection.execute(query.where(responses.c.id.in_(response_ids)))
    by_id = {row[0]: row[1] for row in rows}
    return prompt.scalar_one(), [by_id[one] for one in response_ids]


def _texts(completion: Any) -> list[str]:
    return [completion] if isinstance(completion, str) else [m["content"] for m in completion]


def count_of(t: Transaction, labeller_id: int, project_id: int | None = None) -> dict[str, int]:
    """What a labeller has done and skipped, practice apart, and real tasks left for this labeller.

    In one project, or in all that the labeller sees. MANY stands for more.
    """
    mine = assignments.c.labeller_id == labeller_id
    every = {p["id"] for p in t.projects()}
    here = {p["id"] for p in t.projects(labeller_id) if project_id in (None, p["id"])}
    states: Select[Any] = (
        select(assignments.c.state, func.count())
        .where(mine, assignments.c.strategy != "practice")
        .group_by(assignments.c.state)
    )
    if here != every:  # else the tasks need not be looked up
        states = states.join(tasks, tasks.c.id == assignments.c.task_id)
        states = states.where(tasks.c.project_id.in_(here))
    counted = {row[0]: int(row[1]) for row in t.connection.execute(states)}
    seen = exists().where(assignments.c.task_id == tasks.c.id, mine, _not_expired)
    lacking = and_(tasks.c.kind == "real", tasks.c.taken < tasks.c.need, ~seen)
    open_here = and_(lacking, tasks.c.project_id.in_(here))
    open_tasks = select(tasks.c.id).where(open_here).limit(MANY).subquery()
    left = t.connection.execute(select(func.count()).select_from(open_tasks)).scalar_one()
    done, skipped = counted.get("done", 0), counted.get("skipped", 0)
    return {"done": done, "skipped": skipped, "left": int(left) + counted.get("open", 0)}


def work_of(
    t: Transaction, labeller_id: int, skipped: bool, offset: int, limit: int
) -> Sequence[Mapping[str, Any]]:
    """What a labeller did, or skipped, newest hand-out first."""
    said = annotation_rows.c
    columns: tuple[Any, ...] = (
        *(assignments.c.id, assignments.c.shown, assignments.c.strategy, projects.c.mode),
        *(prompts.c.prompt, said.tiers, said.ratings, said.strength, said.confidence),
        *(said.all_bad, said.flags, said.comment, said.created, said.version),
        *(projects.c.name.label("project"), said.project_version),
    )
    return t.all(
        select(*columns)
        .join(tasks, tasks.c.id == assignments.c.task_id)
        .join(projects, projects.c.id == tasks.c.project_id)
        .join(prompts, prompts.c.id == tasks.c.prompt_id)
        .join(annotation_rows, said.assignment_id == assignments.c.id)
        .where(assignments.c.labeller_id == labeller_id, said.version == assignments.c.version)
        .where(seen_by(labeller_id))
        .where(assignments.c.state.in_(("skipped",) if skipped else ("done", "skipped")))
        .order_by(assignments.c.id.desc())
        .offset(offset)
        .limit(limit)
    )


def lesson_of(t: Transaction, assignment_id: int) -> Mapping[str, Any] | None:
    """(order shown, known order, reason) of an assignment of a practice task; None of others."""
    query = (
        select(assignments.c.shown, tasks.c.gold_tiers, tasks.c.reason)
        .join(tasks, tasks.c.id == assignments.c.task_id)
        .where(assignments.c.id == assignment_id, tasks.c.kind == "practice")
    )
    return next(iter(t.all(query)), None)


@dataclass(frozen=True)
class Progress:
    """How far a project is; gold and repeats are not counted."""

    tasks: int
    needed: int  # annotations that the tasks need
    done: int  # annotations that the tasks have
    held: int  # leases out
    unsettled: int  # tasks that some active labeller could still be given


def progress_of(t: Transaction, project_id: int) -> Progress:
    """Counts over a project's real tasks; what is many is kept (labelling.store.sums)."""
    project = t.one(select(projects).where(projects.c.id == project_id))
    assert project is not None
    real = and_(tasks.c.project_id == project_id, tasks.c.kind == "real")
    sums = func.coalesce(func.sum(day_sums.c.real), 0)
    done = select(sums).where(day_sums.c.project_id == project_id)
    held = (
        select(func.count())
        .select_from(assignments)
        .join(tasks, tasks.c.id == assignments.c.task_id)
        .where(assignments.c.state == text("'open'"))
        # A sum is in no index: SQLite would else walk along the project's tasks.
        .where(tasks.c.project_id + 0 == project_id, tasks.c.kind == "real")
    )
    # A task that lacks annotations is settled all the same when no labeller (admins apart, who need
    # not label) is left to whom it could be given.
    member = and_(members.c.project_id == project_id, members.c.labeller_id == labellers.c.id)
    counts = and_(labellers.c.active, labellers.c.role == "labeller")
    if project["members_only"]:
        counts = and_(counts, exists().where(member))
    active = t.connection.execute(
        select(func.count()).select_from(labellers).where(counts)
    ).scalar_one()
    gone = (
        select(func.count())
        .select_from(assignments)
        .join(labellers, labellers.c.id == assignments.c.labeller_id)
        .where(assignments.c.task_id == tasks.c.id, counts)
        .where(assignments.c.state.in_(("done", "skipped")))
        .scalar_subquery()
    )
    open_ = and_(real, tasks.c.done < tasks.c.need)
    most = func.max(tasks.c.done + tasks.c.skipped)
    unsettled, tried = t.connection.execute(select(func.count(), most).where(open_)).one()
    if active and (tried or 0) >= active:  # else nobody need be looked up
        settled = select(func.count()).select_from(tasks).where(open_, gone >= active)
        unsettled -= t.connection.execute(settled).scalar_one()
    counted, leases = (int(t.connection.execute(q).scalar_one()) for q in (done, held))
    return Progress(project["tasks"], project["needed"], counted, leases, unsettled)


def labellers_of(
    t: Transaction, project_id: int, after: str, limit: int
) -> Sequence[Mapping[str, Any]]:
    """Labellers by name, from after one, with what each has done and skipped in a project."""
    who = labellers.c
    shown = (
        select(who.id, who.name, who.role, who.active)
        .where(who.name > after, who.role != "adjudicator")
        .order_by(who.name)
        .limit(limit)
    )
    people = t.all(shown)
    sums = day_sums.c
    counts: tuple[Any, ...] = (sums.labeller_id, func.sum(sums.done), func.sum(sums.skipped))
    here = (
        select(*counts)
        .where(sums.project_id == project_id)
        .where(sums.labeller_id.in_([one["id"] for one in people]))
        .group_by(sums.labeller_id)
    )
    counted = {row[0]: (int(row[1]), int(row[2])) for row in t.connection.execute(here)}
    return [
        {**one, **dict(zip(("done", "skipped"), counted.get(one["id"], (0, 0)), strict=True))}
        for one in people
    ]


def events_of(t: Transaction, limit: int | None = None) -> Sequence[Mapping[str, Any]]:
    """The audit log with names, newest first."""
    columns: tuple[Any, ...] = (events.c.at, events.c.action, events.c.detail, labellers.c.name)
    query = select(*columns).outerjoin(labellers, labellers.c.id == events.c.labeller_id)
    return t.all(query.order_by(events.c.id.desc()).limit(limit))


def labellers_named(t: Transaction) -> dict[str, int]:
    """The id of each labeller and admin, by name."""
    query: Select[Any] = select(labellers.c.name, labellers.c.id)
    rows = t.connection.execute(query.where(labellers.c.role != "adjudicator"))
    return {row[0]: row[1] for row in rows}
