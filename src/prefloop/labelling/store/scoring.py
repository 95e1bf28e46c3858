"""Statements that write what reward models say of responses and tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import bindparam, select, update

from prefloop.labelling.store.projects import change_project
from prefloop.labelling.store.schema import projects, responses, tasks
from prefloop.labelling.store.transaction import Transaction


def tasks_of(t: Transaction, project_id: int) -> dict[int, Sequence[int]]:
    """The responses of each task, by id."""
    query = select(tasks.c.id, tasks.c.response_ids).where(tasks.c.project_id == project_id)
    return {row["id"]: row["response_ids"] for row in t.all(query)}


def put_scores(
    t: Transaction,
    scores: Mapping[int, Sequence[float]],
    orders: Mapping[int, tuple[float, float]],
) -> None:
    """Scores of responses, one a reward model, and (uncertainty, gap) of tasks."""
    of_response = update(responses).where(responses.c.id == bindparam("row"))
    rows = [{"row": one, "given": list(values)} for one, values in scores.items()]
    t.connection.execute(
        of_response.values(scores=bindparam("given", type_=responses.c.scores.type)), rows
    )
    of_task = update(tasks).where(tasks.c.id == bindparam("row"))
    values: dict[str, Any] = {"uncertainty": bindparam("spread"), "gap": bindparam("difference")}
    rows = [{"row": one, "spread": u, "difference": g} for one, (u, g) in orders.items()]
    t.connection.execute(of_task.values(**values), rows)


def set_strategy(t: Transaction, project_id: int, strategy: str) -> None:
    """How tasks are chosen from now on."""
    own = projects.c.id == project_id
    project = t.one(select(projects).where(own).with_for_update())
    assert project is not None
    change_project(t, project, None, None, {**project["settings"], "strategy": strategy})
