"""Every statement that writes to the labelling store, and those that hand-out needs.

Each method is one step of a transaction that `Store.write` opens and commits; nothing is
acknowledged before the commit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b, sha256
from json import dumps
from typing import Any

from sqlalchemy import Connection, and_, exists, insert, or_, select, text, true, update

from prefloop.labelling.store.schema import (
    annotation_rows,
    assignments,
    events,
    labellers,
    members,
    projects,
    prompts,
    responses,
    sessions,
    snapshots,
    tasks,
)
from prefloop.labelling.store.sums import Sums

Row = Mapping[str, Any]
"""A row of a result, by column."""
CLOCK_SLACK = 60.0
"""A lease that ends later than any lease given now could, plus this, was given by a wrong clock."""


def key_of(*parts: object) -> str:
    """A short hash that names what `parts` (JSON values) say."""
    return blake2b(dumps(parts).encode(), digest_size=16).hexdigest()


def token_hash(token: str) -> str:
    """What is stored of a token: 256 random bits need no slow hash."""
    return sha256(token.encode()).hexdigest()


class Transaction:
    """Steps of one transaction, all of which happened at `now`."""

    def __init__(self, connection: Connection, now: float) -> None:
        self.connection = connection
        self.now = now
        self.sums = Sums()  # written last of all, by `Store.write`

    def one(self, query: Any) -> Row | None:
        """The first row of a query."""
        row = self.connection.execute(query).mappings().first()
        return None if row is None else dict(row)

    def all(self, query: Any) -> Sequence[Row]:
        """Rows of a query."""
        return [dict(row) for row in self.connection.execute(query).mappings()]

    def insert(self, table: Any, **values: object) -> int:
        """A new row; its id."""
        result = self.connection.execute(insert(table).values(**values))
        key = result.inserted_primary_key
        assert key is not None
        return int(key[0])

    def log(self, action: str, by: int | None = None, **detail: object) -> None:
        """A line of the audit log; `by` is a labeller's id."""
        self.insert(events, at=self.now, labeller_id=by, action=action, detail=detail)

    # --- projects and what is to be ranked -------------------------------------------------------

    def project(self, name: str) -> Row | None:
        """A project by name."""
        return self.one(select(projects).where(projects.c.name == name))

    def projects(self, labeller_id: int | None = None) -> Sequence[Row]:
        """All projects, or those that a labeller sees, oldest first."""
        seen = true() if labeller_id is None else seen_by(labeller_id)
        return self.all(select(projects).where(seen).order_by(projects.c.id))

    def put_snapshot(self, model: str, weights: str) -> int:
        """The policy that wrote responses."""
        same = and_(snapshots.c.model == model, snapshots.c.weights == weights)
        known = self.one(select(snapshots.c.id).where(same))
        if known is not None:
            return int(known["id"])
        return self.insert(snapshots, model=model, weights=weights, created=self.now)

    def put_prompt(self, project_id: int, prompt: object, extra: Mapping[str, object]) -> int:
        """A prompt, once in a project."""
        key = key_of(prompt)
        same = and_(prompts.c.project_id == project_id, prompts.c.key == key)
        known = self.one(select(prompts.c.id).where(same))
        if known is not None:
            return int(known["id"])
        values = {"key": key, "prompt": prompt, "extra": dict(extra)}
        return self.insert(prompts, project_id=project_id, **values)

    def put_response(self, prompt_id: int, completion: object, **facts: object) -> int:
        """An answer to a prompt, with what is known of its making."""
        return self.insert(responses, prompt_id=prompt_id, completion=completion, **facts)

    def task_by_key(self, project_id: int, key: str) -> Row | None:
        """A task by the hash of what it asks."""
        same = and_(tasks.c.project_id == project_id, tasks.c.key == key)
        return self.one(select(tasks).where(same))

    def put_task(self, **values: Any) -> int:
        """A task, nobody's yet unless `values` say otherwise."""
        if values["kind"] == "real":
            self.sums.count_task(values["project_id"], 1, values["need"])
        start: dict[str, object] = {"taken": 0, "done": 0, "priority": 0, "draw": 0.0}
        return self.insert(tasks, **{**start, "uncertainty": 0.0, "gap": 0.0, **values})

    # --- labellers and sessions ------------------------------------------------------------------

    def put_labeller(self, name: str, role: str, token: str) -> int:
        """A new labeller; a known one gets the new token, role and access, and old sessions end."""
        known = self.labeller_named(name)
        values = {"role": role, "token_hash": token_hash(token), "active": True}
        if known is None:
            return self.insert(labellers, name=name, handed=0, created=self.now, **values)
        mine = labellers.c.id == known["id"]
        self.connection.execute(update(labellers).where(mine).values(**values))
        self.connection.execute(sessions.delete().where(sessions.c.labeller_id == known["id"]))
        return int(known["id"])

    def labeller_named(self, name: str) -> Row | None:
        """A labeller by name."""
        return self.one(select(labellers).where(labellers.c.name == name))

    def set_active(self, labeller_id: int, active: bool) -> None:
        """Let a labeller in or shut the door; annotations stay."""
        query = update(labellers).where(labellers.c.id == labeller_id).values(active=active)
        self.connection.execute(query)

    def open_session(self, token: str, session: str, seconds: float) -> Row | None:
        """A session for the owner of a link's token; None where nobody active owns it."""
        owner = self.one(
            select(labellers).where(labellers.c.token_hash == token_hash(token), labellers.c.active)
        )
        if owner is not None:
            self.connection.execute(sessions.delete().where(sessions.c.expires < self.now))
            hashed = token_hash(session)
            values = {"labeller_id": owner["id"], "expires": self.now + seconds}
            self.connection.execute(insert(sessions).values(token_hash=hashed, **values))
        return owner

    def session(self, session: str) -> Row | None:
        """The active labeller of a session that has not expired."""
        return self.one(
            select(labellers)
            .join(sessions, sessions.c.labeller_id == labellers.c.id)
            .where(sessions.c.token_hash == token_hash(session))
            .where(sessions.c.expires >= self.now, labellers.c.active)
        )

    def close_session(self, session: str) -> None:
        """Log out."""
        mine = sessions.c.token_hash == token_hash(session)
        self.connection.execute(sessions.delete().where(mine))

    # --- hand-out --------------------------------------------------------------------------------

    def lock_labeller(self, labeller_id: int) -> int:
        """How many tasks a labeller was handed; one labeller's requests wait for each other."""
        mine = labellers.c.id == labeller_id
        row = self.one(select(labellers.c.handed).where(mine).with_for_update())
        assert row is not None
        return int(row["handed"])

    def count_hand_out(self, labeller_id: int) -> None:
        """One more task handed to a labeller."""
        mine = labellers.c.id == labeller_id
        query = update(labellers).where(mine).values(handed=labellers.c.handed + 1)
        self.connection.execute(query)

    def release_expired(self, lease_seconds: float) -> None:
        """Take back leases that ran out, or that a wrong clock gave; a few at a time."""
        late = assignments.c.leased_until < self.now
        strange = assignments.c.leased_until > self.now + lease_seconds + CLOCK_SLACK
        rows = self.all(
            select(assignments.c.id, assignments.c.task_id)
            .where(assignments.c.state == text("'open'"), or_(late, strange))
            .order_by(assignments.c.task_id)  # all lock in one order
            .limit(50)
            .with_for_update(skip_locked=True)
        )
        for row in rows:
            self.set_assignment(row["id"], state="expired")
            self.give_back(row["task_id"])

    def first_open(self, project_id: int, labeller_id: int, strategy: str) -> int | None:
        """The first real task in a strategy's order that is not this labeller's already."""
        column = {"uncertainty": tasks.c.uncertainty, "gap": tasks.c.gap}.get(strategy)
        order = tasks.c.draw if column is None else column.desc()
        return self._first_task(
            project_id, labeller_id, "real", order, tasks.c.taken < tasks.c.need
        )

    def first_known(self, project_id: int, labeller_id: int, kind: str) -> int | None:
        """A gold or practice task, whose order is known, that this labeller has not seen."""
        anybody = tasks.c.need.is_(None)
        return self._first_task(project_id, labeller_id, kind, tasks.c.draw, anybody)

    def _first_task(
        self, project_id: int, labeller_id: int, kind: str, order: Any, open_: Any
    ) -> int | None:
        mine = and_(
            assignments.c.task_id == tasks.c.id,
            assignments.c.labeller_id == labeller_id,
            assignments.c.state != "expired",
        )
        row = self.one(
            select(tasks.c.id)
            .where(tasks.c.project_id == project_id, tasks.c.kind == kind, open_)
            .where(~exists().where(mine))
            .order_by(tasks.c.priority.desc(), order)
            .limit(1)
            .with_for_update(skip_locked=True, of=tasks)
        )
        return None if row is None else int(row["id"])

    def repeatable(self, project_id: int, labeller_id: int, back: int) -> Row | None:
        """An own real task of at least `back` annotations ago that was not repeated yet."""
        again = tasks.alias("again")
        return self.one(
            select(tasks)
            .join(assignments, assignments.c.task_id == tasks.c.id)
            .where(assignments.c.labeller_id == labeller_id, assignments.c.state == "done")
            .where(tasks.c.project_id == project_id, tasks.c.kind == "real")
            .where(
                ~exists().where(again.c.repeat_of == tasks.c.id, again.c.labeller_id == labeller_id)
            )
            .order_by(assignments.c.id.desc())
            .offset(back)
            .limit(1)
        )

    def take(self, task_id: int) -> bool:
        """One more labeller on a task, unless it has all it needs."""
        room = or_(tasks.c.need.is_(None), tasks.c.taken < tasks.c.need)
        query = update(tasks).where(tasks.c.id == task_id, room).values(taken=tasks.c.taken + 1)
        return self.connection.execute(query).rowcount == 1

    def give_back(self, task_id: int) -> None:
        """One labeller less on a task."""
        query = update(tasks).where(tasks.c.id == task_id).values(taken=tasks.c.taken - 1)
        self.connection.execute(query)

    def answers_of(self, task_id: int) -> int:
        """How many answers a task has."""
        row = self.one(select(tasks.c.response_ids).where(tasks.c.id == task_id))
        assert row is not None
        return len(row["response_ids"])

    def put_repeat(self, task: Row, labeller_id: int) -> int:
        """The same task once more, for one labeller."""
        same = ("project_id", "prompt_id", "response_ids")
        return self.put_task(
            **{name: task[name] for name in same},
            key=key_of("repeat", task["id"], labeller_id),
            kind="repeat",
            repeat_of=task["id"],
            labeller_id=labeller_id,
            need=1,
            taken=1,
        )

    def put_assignment(
        self, task_id: int, labeller_id: int, shown: Sequence[int], strategy: str, until: float
    ) -> int:
        """A task for a labeller; one that had expired in these hands opens again as it was."""
        known = self.one(
            select(assignments.c.id).where(
                assignments.c.labeller_id == labeller_id, assignments.c.task_id == task_id
            )
        )
        if known is not None:
            self.set_assignment(known["id"], state="open", leased_until=until)
            return int(known["id"])
        lease = {"state": "open", "leased_until": until, "version": 0, "created": self.now}
        values = {"shown": list(shown), "strategy": strategy, **lease}
        return self.insert(assignments, task_id=task_id, labeller_id=labeller_id, **values)

    def set_assignment(self, assignment_id: int, **values: object) -> None:
        """Change an assignment."""
        mine = assignments.c.id == assignment_id
        self.connection.execute(update(assignments).where(mine).values(**values))

    def assignment(self, assignment_id: int, labeller_id: int) -> Row | None:
        """A labeller's assignment with its task, locked."""
        mine = assignments.c.id == assignment_id
        return self.one(_held(labeller_id).where(mine).with_for_update(of=assignments))

    def shown_order(self, assignment_id: int, labeller_id: int) -> list[int]:
        """Positions as a labeller's assignment shows them; none for any other one."""
        mine = and_(assignments.c.id == assignment_id, assignments.c.labeller_id == labeller_id)
        row = self.one(select(assignments.c.shown).where(mine))
        return list(row["shown"]) if row else []

    def current(self, labeller_id: int, project_id: int | None = None) -> Row | None:
        """The open assignment of a labeller, in one project or in any."""
        here = true() if project_id is None else tasks.c.project_id == project_id
        mine = and_(assignments.c.state == "open", here)
        newest = assignments.c.id.desc()
        return self.one(_held(labeller_id).where(mine).order_by(newest).limit(1))

    def finished(self, labeller_id: int, before: int | None) -> Row | None:
        """The assignment a labeller finished or skipped last, or last before another."""
        mine = and_(
            assignments.c.state.in_(("done", "skipped")),
            true() if before is None else assignments.c.id < before,
        )
        newest = assignments.c.id.desc()
        return self.one(_held(labeller_id).where(mine).order_by(newest).limit(1))

    # --- annotations -----------------------------------------------------------------------------

    def put_annotation(self, assignment_id: int, version: int, **values: object) -> int:
        """A new version of what a labeller says of a task."""
        row = {"created": self.now, **values}
        return self.insert(annotation_rows, assignment_id=assignment_id, version=version, **row)

    def annotation_of_request(self, request_id: str) -> Row | None:
        """What a request that is sent again has written."""
        return self.one(select(annotation_rows).where(annotation_rows.c.request_id == request_id))

    def annotation(self, assignment_id: int, version: int) -> Row | None:
        """One version of an annotation."""
        same = and_(
            annotation_rows.c.assignment_id == assignment_id, annotation_rows.c.version == version
        )
        return self.one(select(annotation_rows).where(same))

    def count_done(self, task_id: int, change: int = 1) -> None:
        """One more annotated assignment of a task."""
        query = update(tasks).where(tasks.c.id == task_id).values(done=tasks.c.done + change)
        self.connection.execute(query)


def seen_by(labeller_id: int) -> Any:
    """Whether a labeller sees a row of `projects`: everybody does, or its members alone."""
    member = and_(members.c.project_id == projects.c.id, members.c.labeller_id == labeller_id)
    return or_(~projects.c.members_only, exists().where(member))


def _held(labeller_id: int) -> Any:
    """A labeller's assignments, in projects that this labeller sees, with what hand-out and
    submission need of their tasks."""
    task, project = tasks.c, projects.c
    cols: tuple[Any, ...] = (
        *(task.project_id, task.kind, task.response_ids, task.prompt_id, project.mode),
        *(project.settings, project.guidelines, project.name.label("project")),
        project.version.label("project_version"),
    )
    return (
        select(assignments, *cols)
        .join(tasks, tasks.c.id == assignments.c.task_id)
        .join(projects, projects.c.id == tasks.c.project_id)
        .where(assignments.c.labeller_id == labeller_id, seen_by(labeller_id))
    )
