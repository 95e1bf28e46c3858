"""What the admin's pages read: tasks a page at a time, and annotations by day.

Every statement walks along an index, and a search looks through a bounded number of tasks, so that
a page comes as quickly from a million annotations as from a hundred.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from json import dumps
from typing import Any, Literal

from sqlalchemy import (
    Select,
    Text,
    and_,
    case,
    exists,
    func,
    or_,
    select,
    text,
    true,
    type_coerce,
)

from prefloop.labelling.store.schema import (
    PACES,
    annotation_rows,
    assignments,
    day_sums,
    labellers,
    prompts,
    responses,
    tasks,
)
from prefloop.labelling.store.sums import COLUMNS, DAY
from prefloop.labelling.store.transaction import Row, Transaction

State = Literal["any", "open", "held", "done", "disputed", "adjudicated"]
Kind = Literal["any", "real", "gold", "repeat", "practice"]
SEARCHED = 20_000
"""Tasks that one search looks through before it asks whether to go on."""


@dataclass(frozen=True)
class Wanted:
    """Which tasks the list shows. Disputed ones come worst first, all others as they came in."""

    state: State = "any"
    kind: Kind = "any"
    flagged: bool = False  # with flags or a comment
    labeller: int | None = None  # who did or skipped it
    text: str = ""  # in the prompt or an answer to it; A to Z are as a to z
    after: tuple[float, int] | None = None  # (disagreement or 0, id) of the last task seen


def tasks_of(
    t: Transaction, project_id: int, wanted: Wanted, limit: int
) -> tuple[Sequence[Row], tuple[float, int] | None]:
    """A page of tasks, and what to go on after: the last row's place, or where the search stopped.

    None where there are no more.
    """
    worst = tasks.c.disagreement.desc()
    order = (worst, tasks.c.id) if wanted.state == "disputed" else (tasks.c.id,)
    chosen = (
        select(tasks.c.id)
        .where(tasks.c.project_id == project_id, *_conditions(wanted))
        .order_by(*order)
    )
    # What the tasks' own rows and the indexes say first, then texts of a bounded number of them.
    most = SEARCHED if wanted.text else limit + 1
    part = chosen.limit(most).subquery()
    columns: tuple[Any, ...] = (tasks, prompts.c.prompt)
    query: Select[Any] = (
        select(*columns)
        .join(part, part.c.id == tasks.c.id)
        .join(prompts, prompts.c.id == tasks.c.prompt_id)
        .where(_holds(wanted.text) if wanted.text else true())
        .order_by(*order)
        .limit(limit + 1)
    )
    rows = t.all(query)
    last: Row | None = rows[limit - 1] if len(rows) > limit else None
    if last is None and wanted.text:
        stopped = chosen.offset(SEARCHED - 1).limit(1).subquery()
        last = t.one(select(tasks).join(stopped, stopped.c.id == tasks.c.id))
    if last is None:
        return rows[:limit], None
    return rows[:limit], (float(last["disagreement"] or 0.0), int(last["id"]))


def _conditions(wanted: Wanted) -> list[Any]:
    """What tasks must be. Numbers that partial indexes name are written out, not bound."""
    task, nought = tasks.c, text("0")
    leased = select(assignments.c.task_id).where(assignments.c.state == text("'open'"))
    states: dict[str, list[Any]] = {
        "any": [],
        "open": [task.done < task.need, task.taken < task.need],
        "held": [task.id.in_(leased)],
        "done": [task.done >= task.need],
        "disputed": [task.disagreement > nought, ~task.adjudicated],
        "adjudicated": [task.adjudicated],
    }
    found = states[wanted.state]
    if wanted.kind != "any":
        found.append(task.kind == wanted.kind)
    if wanted.flagged:
        found.append(task.flagged > nought)
    if wanted.labeller is not None:
        mine = and_(
            assignments.c.labeller_id == wanted.labeller,
            assignments.c.state.in_(("done", "skipped")),
        )
        found.append(task.id.in_(select(assignments.c.task_id).where(mine)))
    if wanted.after is not None:
        worst, last = wanted.after
        later = task.id > last
        if wanted.state == "disputed":
            later = or_(task.disagreement < worst, and_(task.disagreement == worst, later))
        found.append(later)
    return found


def _holds(wanted: str) -> Any:
    """Whether a task's prompt, or an answer to it, holds a text: both are JSON of ASCII marks."""
    written = dumps(wanted)[1:-1]

    def within(column: Any) -> Any:
        return type_coerce(column, Text).icontains(written, autoescape=True)

    own = responses.c.prompt_id == tasks.c.prompt_id
    return or_(within(prompts.c.prompt), exists().where(own, within(responses.c.completion)))


def flagged_of(t: Transaction, project_id: int, limit: int) -> Sequence[Row]:
    """Annotations that carry flags or a comment, of the newest such tasks."""
    said = annotation_rows.c
    newest = (
        select(tasks.c.id)
        .where(tasks.c.project_id == project_id, tasks.c.flagged > text("0"))
        .order_by(tasks.c.id.desc())
        .limit(limit)
    )
    columns: tuple[Any, ...] = (assignments.c.task_id, labellers.c.name, said.flags, said.comment)
    return t.all(
        select(*columns)
        .join(assignments, assignments.c.id == said.assignment_id)
        .join(labellers, labellers.c.id == assignments.c.labeller_id)
        .where(assignments.c.task_id.in_(newest), said.version == assignments.c.version)
        .where((said.flags != []) | (said.comment != ""))
        .order_by(said.id.desc())
        .limit(limit)
    )


def task_of(t: Transaction, project_id: int, task_id: int) -> Row | None:
    """One task of a project."""
    return t.one(select(tasks).where(tasks.c.project_id == project_id, tasks.c.id == task_id))


# --- by day --------------------------------------------------------------------------------------


def days_of(t: Transaction, project_id: int, points: int, days: int = 1) -> Sequence[Row]:
    """What each labeller did in each of the last points of so many `days`: real tasks, as they are
    said now.

    `labeller`, `point` (number since 1970, UTC), `annotations`, `seconds` (their sum), `shared` and
    `agreed` (tasks that others did too, and the sum of the pair agreement of all who did them), and
    how many took up to each of PACES seconds (`pace_5`, ...).
    """
    first = (int(t.now // (days * DAY)) - points + 1) * days
    sums = day_sums.c
    part = (
        select(
            (sums.day // days).label("point"), *(sums[name] for name in ("labeller_id", *COLUMNS))
        )
        .where(sums.project_id == project_id, sums.day >= first, sums.annotations > 0)
        .subquery()
        .c
    )
    columns: tuple[Any, ...] = (
        *(labellers.c.name.label("labeller"), part.point),
        func.sum(part.annotations).label("annotations"),
        (func.sum(part.milliseconds) / 1e3).label("seconds"),
        func.sum(part.shared).label("shared"),
        (func.sum(part.agreed) / 1e9).label("agreed"),
        *(func.sum(part[f"pace_{pace}"]).label(f"pace_{pace}") for pace in PACES),
    )
    return t.all(
        select(*columns)
        .join(labellers, labellers.c.id == part.labeller_id)
        .group_by(labellers.c.name, part.point)
        .order_by(labellers.c.name, part.point)
    )


def hours_of(t: Transaction, project_id: int, points: int, by: float = 3600.0) -> Sequence[Row]:
    """The same as `days_of` by hours (or `by` seconds): counted, not kept, as they are few."""
    said = annotation_rows.c
    # One expression, not one each time: PostgreSQL groups by what it can tell is the same.
    recent: Select[Any] = (
        select(
            func.floor(said.created / by).label("point"),
            *(assignments.c.labeller_id, said.seconds, tasks.c.disagreement),
        )
        .join(assignments, assignments.c.id == said.assignment_id)
        .join(tasks, tasks.c.id == assignments.c.task_id)
        .where(said.created >= (t.now // by - points + 1) * by)
        .where(tasks.c.project_id + 0 == project_id)  # not along the project's tasks
        .where(said.version == assignments.c.version, assignments.c.state == "done")
        .where(tasks.c.kind == "real", assignments.c.strategy.not_in(("import", "adjudication")))
    )
    one = recent.subquery().c
    paces = [func.sum(case((one.seconds <= p, 1), else_=0)).label(f"pace_{p}") for p in PACES]
    columns: tuple[Any, ...] = (
        *(labellers.c.name.label("labeller"), one.point, func.count().label("annotations")),
        *(func.sum(one.seconds).label("seconds"), func.count(one.disagreement).label("shared")),
        func.coalesce(func.sum(1.0 - one.disagreement), 0.0).label("agreed"),
        *paces,
    )
    return t.all(
        select(*columns)
        .join(labellers, labellers.c.id == one.labeller_id)
        .group_by(labellers.c.name, one.point)
        .order_by(labellers.c.name, one.point)
    )


def has_scores(t: Transaction, project_id: int, strategy: str) -> bool:
    """Whether any task of a project has what a strategy goes by."""
    scored = tasks.c[strategy] > 0
    found = exists().where(tasks.c.project_id == project_id, scored)
    return bool(t.connection.execute(select(found)).scalar_one())
