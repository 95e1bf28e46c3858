"""What labellers did by day, and how many tasks there are, kept as it is written, so that no page
counts all annotations.

Sums are of whole numbers (thousandths of a second, parts of 10^9 of agreement), so that adding and
taking away leaves what counting anew gives.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from math import floor
from typing import Any

from sqlalchemy import Connection, update
from sqlalchemy.dialects import postgresql, sqlite

from prefloop.labelling.store.schema import PACES, day_sums, projects

DAY = 86_400.0
COLUMNS = [column.name for column in day_sums.columns if not column.primary_key]


class Sums:
    """What one transaction adds to the sums."""

    def __init__(self) -> None:
        self._days = defaultdict[tuple[int, int, int], Counter[str]](Counter)
        self._projects = defaultdict[int, Counter[str]](Counter)

    def count_task(self, project_id: int, tasks: int, needed: int) -> None:
        """More real tasks of a project, or more labellers that they need."""
        self._projects[project_id].update(tasks=tasks, needed=needed)

    def count(
        self, said: Mapping[str, Any], task: Mapping[str, Any], apart: float | None, times: int
    ) -> None:
        """Add (`times` 1) or take away (-1) an assignment that is done or skipped.

        `said` has its `labeller_id`, `strategy` and `state`, and `created` and `seconds` of its
        newest version, `task` its `project_id` and `kind`; `apart` is the task's disagreement.
        """
        if said["strategy"] == "adjudication" or said["state"] not in ("done", "skipped"):
            return
        found = Counter({said["state"]: 1})
        if task["kind"] == "real" and said["state"] == "done":
            found["real"] = 1
            if said["strategy"] != "import":
                found["annotations"] = 1
                found["milliseconds"] = floor(1000.0 * said["seconds"] + 0.5)
                found.update(f"pace_{pace}" for pace in PACES if said["seconds"] <= pace)
                if apart is not None:
                    found["shared"] = 1
                    found["agreed"] = floor(1e9 * (1.0 - apart) + 0.5)
        mine = self._days[task["project_id"], floor(said["created"] / DAY), said["labeller_id"]]
        for name, number in found.items():
            mine[name] += times * number

    def write(self, connection: Connection) -> None:
        """Add to what the store holds, last of all and in one order: so servers that count the same
        never wait for each other in a ring."""
        for project_id, more in sorted(self._projects.items()):
            mine = projects.c.id == project_id
            total = {name: projects.c[name] + more[name] for name in ("tasks", "needed")}
            connection.execute(update(projects).where(mine).values(**total))
        rows = [
            dict(zip(("project_id", "day", "labeller_id"), key, strict=True))
            | {name: changes[name] for name in COLUMNS}
            for key, changes in sorted(self._days.items())
            if any(changes.values())
        ]
        if rows:
            dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
            added = dialect.insert(day_sums)
            total = {name: day_sums.c[name] + added.excluded[name] for name in COLUMNS}
            keys = list(day_sums.primary_key.columns)
            connection.execute(added.on_conflict_do_update(index_elements=keys, set_=total), rows)
