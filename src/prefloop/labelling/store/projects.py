"""Statements that write projects: their guidelines and settings by version, and who sees them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import and_, delete, exists, insert, select, update

from prefloop.errors import UserError
from prefloop.labelling.store.schema import (
    assignments,
    labellers,
    members,
    project_versions,
    projects,
    tasks,
)
from prefloop.labelling.store.transaction import Row, Transaction, seen_by

Changes = Mapping[str, Sequence[Any]]
"""What became of each setting, by name: from and to."""


def put_project(
    t: Transaction,
    name: str,
    mode: str,
    guidelines: str | None,
    settings: Mapping[str, object],
    seen: Collection[int] = (),
) -> tuple[int, Changes]:
    """A new project, or new settings of an old one; the mode of one that has tasks stays.

    `seen`: the labellers that alone see it; none for everybody, or for those who saw it before.
    """
    known = t.project(name)
    if known is None:
        values = {"mode": mode, "guidelines": guidelines or "", "settings": dict(settings)}
        project_id = t.insert(projects, name=name, created=t.now, version=1, **values)
        _put_version(t, project_id, 1, guidelines or "", settings, None)
        changes: Changes = {}
    elif known["mode"] != mode:
        raise UserError(
            f"project {name} is a {known['mode']} project; give --mode {known['mode']} or "
            "another --project"
        )
    else:
        project_id = int(known["id"])
        changes = change_project(t, known, None, guidelines, settings)
    if seen:
        set_members(t, project_id, None, {*members_of(t, project_id), *seen})
    return project_id, changes


def change_project(
    t: Transaction,
    project: Row,
    by: int | None,
    guidelines: str | None,
    settings: Mapping[str, object],
) -> Changes:
    """Guidelines (None: as they are) and settings as the project's next version, and in the log.

    Nothing is written where nothing changed.
    """
    before: dict[str, Any] = {**project["settings"], "guidelines": project["guidelines"]}
    kept = project["guidelines"] if guidelines is None else guidelines
    after: dict[str, Any] = {**settings, "guidelines": kept}
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    changes = {name: [before.get(name), after.get(name)] for name in names}
    if changes:
        version = project["version"] + 1
        values = {"guidelines": kept, "settings": dict(settings), "version": version}
        mine = projects.c.id == project["id"]
        t.connection.execute(update(projects).where(mine).values(**values))
        _put_version(t, project["id"], version, kept, settings, by)
        t.log("settings", by, project=project["name"], version=version, changed=changes)
    return changes


def _put_version(
    t: Transaction,
    project_id: int,
    version: int,
    guidelines: str,
    settings: Mapping[str, object],
    by: int | None,
) -> None:
    values = {"guidelines": guidelines, "settings": dict(settings), "created": t.now}
    t.insert(project_versions, project_id=project_id, version=version, labeller_id=by, **values)


def locked_project(t: Transaction, name: str) -> Row | None:
    """A project by name, held until the transaction ends."""
    return t.one(select(projects).where(projects.c.name == name).with_for_update())


def version_of(t: Transaction, project_id: int, version: int) -> Row | None:
    """One version of a project's guidelines and settings."""
    same = and_(project_versions.c.project_id == project_id, project_versions.c.version == version)
    return t.one(select(project_versions).where(same))


def versions_of(
    t: Transaction, project_id: int, most: int | None = None, before: int | None = None
) -> Sequence[Row]:
    """Versions with the names of those who made them, newest first; `before`: older than that."""
    columns: tuple[Any, ...] = (project_versions, labellers.c.name)
    query = (
        select(*columns)
        .outerjoin(labellers, labellers.c.id == project_versions.c.labeller_id)
        .where(project_versions.c.project_id == project_id)
        .order_by(project_versions.c.version.desc())
        .limit(most)
    )
    return t.all(query if before is None else query.where(project_versions.c.version < before))


# --- who sees a project --------------------------------------------------------------------------


def members_of(t: Transaction, project_id: int) -> set[int]:
    """The labellers that see a project even where not everybody does."""
    query = select(members.c.labeller_id).where(members.c.project_id == project_id)
    return set(t.connection.execute(query).scalars())


def set_members(
    t: Transaction, project_id: int, by: int | None, chosen: Collection[int] | None
) -> None:
    """Let the chosen labellers alone see a project (None: everybody), and log what changed.

    Leases of those who do not see it any more are given back.
    """
    project = t.one(select(projects).where(projects.c.id == project_id).with_for_update())
    assert project is not None
    before, after = members_of(t, project_id), set(chosen or ())
    t.connection.execute(delete(members).where(members.c.project_id == project_id))
    if after:
        rows = [{"project_id": project_id, "labeller_id": one} for one in sorted(after)]
        t.connection.execute(insert(members), rows)
    only = chosen is not None
    own = projects.c.id == project_id
    t.connection.execute(update(projects).where(own).values(members_only=only))
    # Who has an open task here and may not see it.
    held = t.all(
        select(assignments.c.id, assignments.c.task_id, assignments.c.labeller_id)
        .join(tasks, tasks.c.id == assignments.c.task_id)
        .where(tasks.c.project_id == project_id, assignments.c.state == "open")
        .order_by(assignments.c.task_id)
    )
    for row in held if only else ():
        if row["labeller_id"] not in after:
            t.set_assignment(row["id"], state="expired")
            t.give_back(row["task_id"])
    if only != project["members_only"] or before != after:
        names = {row["id"]: row["name"] for row in t.all(select(labellers.c.id, labellers.c.name))}
        t.log(
            "members", by, project=project["name"], members_only=[project["members_only"], only],
            added=sorted(names[one] for one in after - before),
            removed=sorted(names[one] for one in before - after),
        )  # fmt: skip


def sees(t: Transaction, labeller_id: int, project_id: int) -> bool:
    """Whether a labeller sees a project."""
    found = exists().where(projects.c.id == project_id, seen_by(labeller_id))
    return bool(t.connection.execute(select(found)).scalar_one())
