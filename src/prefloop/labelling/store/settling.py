"""Annotations that no hand-out asked for, and what a task's annotations say of it together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from sqlalchemy import and_, select, update

from prefloop.labelling.agreement import pair_agreement, pair_signs, ranks_of
from prefloop.labelling.store.schema import annotation_rows, assignments, tasks
from prefloop.labelling.store.transaction import Row, Transaction, key_of

Tiers = Sequence[Sequence[int]]


def put_finished(
    t: Transaction, task_id: int, labeller_id: int, strategy: str, tiers: Tiers | None
) -> bool:
    """An annotation that no hand-out asked for; False where the labeller has done the task.

    It raises `need` where there is no room for it. An adjudication is not counted at all: it is
    said about the annotations, not beside them; said again it is the next version, and without
    tiers it is withdrawn.
    """
    same = and_(assignments.c.task_id == task_id, assignments.c.labeller_id == labeller_id)
    known = t.one(select(assignments).where(same))
    counts = strategy != "adjudication"
    if known is not None and (counts or known["strategy"] != "adjudication"):
        return False
    if known is None:
        answers = t.answers_of(task_id)
        held = t.put_assignment(task_id, labeller_id, range(answers), strategy, t.now)
        version = 1
    else:
        held, version = int(known["id"]), int(known["version"]) + 1
    t.set_assignment(held, state="skipped" if tiers is None else "done", version=version)
    said = None if tiers is None else [list(tier) for tier in tiers]
    request = key_of(strategy, held, version)
    values = {"tiers": said, "all_bad": False, "flags": []}
    t.put_annotation(held, version, **values, comment="", seconds=0.0, request_id=request)
    if counts:
        full = and_(tasks.c.id == task_id, tasks.c.need == tasks.c.taken, tasks.c.kind == "real")
        more = update(tasks).where(full).values(need=tasks.c.need + 1).returning(tasks.c.project_id)
        for project_id in t.connection.execute(more).scalars():
            t.sums.count_task(project_id, 0, 1)
        t.take(task_id)
        t.count_done(task_id)
    settle(t, task_id, held, None)
    return True


def settle(t: Transaction, task_id: int, changed: int, before: Row | None) -> None:
    """Write beside a task what its newest annotations say together, and the sums by day.

    `changed` is the assignment that has a new version, `before` what `sums.count` takes of its
    version before; None where it had none that counts.
    """
    # The task's row is held first: of two who submit at once the second sees what the first said.
    facts = ("disagreement", "flagged", "skipped", "adjudicated")
    own = tasks.c.id == task_id
    names = ("project_id", "kind", *facts)
    row: tuple[Any, ...] = tuple(tasks.c[name] for name in names)
    task = t.one(select(*row).where(own).with_for_update())
    assert task is not None
    said = annotation_rows.c
    newest = and_(said.assignment_id == assignments.c.id, said.version == assignments.c.version)
    mine, own_said = assignments.c, (said.tiers, said.flags, said.comment, said.seconds)
    columns: tuple[Any, ...] = (
        *(mine.id, mine.labeller_id, mine.strategy, mine.state, said.created),
        *own_said,
    )
    rows = t.all(
        select(*columns).join(annotation_rows, newest).where(assignments.c.task_id == task_id)
    )
    orders = [r["tiers"] for r in rows if r["tiers"] and r["strategy"] != "adjudication"]
    settled = [r for r in rows if r["tiers"] and r["strategy"] == "adjudication"]
    values = {
        "disagreement": disagreement(orders) if task["kind"] == "real" else None,
        "flagged": sum(bool(r["flags"] or r["comment"]) for r in rows),
        "skipped": sum(r["state"] == "skipped" for r in rows),
        "adjudicated": bool(settled),
    }
    for r in rows:
        was = before if r["id"] == changed else r
        if was is not None:
            t.sums.count(was, task, task["disagreement"], -1)
        t.sums.count(r, task, values["disagreement"], 1)
    if any(task[name] != values[name] for name in facts):
        t.connection.execute(update(tasks).where(own).values(**values))


def disagreement(orders: Sequence[Tiers]) -> float | None:
    """1 minus the mean pair agreement of every two orders; None of fewer than two.

    >>> disagreement([[[0], [1], [2]], [[0], [2], [1]], [[0], [1, 2]]])
    0.222222222
    """
    if len(orders) < 2:
        return None
    answers = sum(map(len, orders[0]))
    signs = pair_signs(np.array([ranks_of(tiers, answers) for tiers in orders]))
    first, second = map(list, zip(*combinations(range(len(orders)), 2), strict=True))
    return round(float(1.0 - pair_agreement(signs[first], signs[second]).mean()), 9)
