"""Tables of the labelling store. Times are seconds since 1970 (UTC); JSON is ASCII text.

A task asks for an order of one prompt's responses. An assignment is a task in one labeller's hands:
a lease, the order shown, a draft. An annotation is what came of it; its versions are never
overwritten, and `assignments.version` names the newest. Tiers hold positions in
`tasks.response_ids`, whatever order was shown.
"""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    false,
    text,
)


class Json(TypeDecorator[Any]):
    """JSON as ASCII text, so that NUL and half characters can be stored in every database."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        """To the database."""
        return None if value is None else json.dumps(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        """From the database."""
        return None if value is None else json.loads(value)


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _id() -> Column[int]:
    return Column("id", Integer, primary_key=True)


def _to(name: str, *, nullable: bool = False) -> Column[int]:
    return Column(f"{name}_id", ForeignKey(f"{name}s.id"), nullable=nullable)


projects = Table(
    "projects",
    metadata,
    _id(),
    Column("name", String(200), nullable=False, unique=True),
    Column("mode", String(20), nullable=False),  # ranking, pairwise, rating
    Column("guidelines", Text, nullable=False),
    Column("settings", Json, nullable=False),  # labelling.imports._settings
    Column("created", Float, nullable=False),
    Column("version", Integer, nullable=False, server_default="1"),  # of guidelines and settings
    Column("members_only", Boolean, nullable=False, server_default=false()),
    Column("tasks", Integer, nullable=False, server_default="0"),  # real ones
    Column("needed", Integer, nullable=False, server_default="0"),  # labellers that those need
)
snapshots = Table(  # what wrote responses: a policy at one state of its weights
    "snapshots",
    metadata,
    _id(),
    Column("model", Text, nullable=False),
    Column("weights", String(64), nullable=False),  # sha256 of its weight files, "" if not known
    Column("created", Float, nullable=False),
    UniqueConstraint("model", "weights"),
)
prompts = Table(
    "prompts",
    metadata,
    _id(),
    _to("project"),
    Column("key", String(32), nullable=False),  # hash of the prompt
    Column("prompt", Json, nullable=False),
    Column("extra", Json, nullable=False),  # the row's other columns
    UniqueConstraint("project_id", "key"),
)
responses = Table(
    "responses",
    metadata,
    _id(),
    _to("prompt"),
    _to("snapshot", nullable=True),
    Column("completion", Json, nullable=False),
    Column("sampling", Json),
    Column("seed", Integer),
    Column("log_prob", Float),  # nats, of the whole answer
    Column("finish_reason", String(40)),
    Column("token_ids", Json),  # as sampled, the stop token included
    Column("tokenizer", String(40)),  # whose tokens they are
    Column("scores", Json),  # one a reward model
    Index(None, "prompt_id"),
)
labellers = Table(
    "labellers",
    metadata,
    _id(),
    Column("name", String(200), nullable=False, unique=True),
    Column("role", String(20), nullable=False),  # labeller, admin, adjudicator
    Column("token_hash", String(64), nullable=False, unique=True),
    Column("active", Boolean, nullable=False),
    Column("handed", Integer, nullable=False),  # tasks handed out so far: seeds the next choice
    Column("created", Float, nullable=False),
)
project_versions = Table(  # guidelines and settings as they stood; never overwritten
    "project_versions",
    metadata,
    _id(),
    _to("project"),
    Column("version", Integer, nullable=False),
    Column("guidelines", Text, nullable=False),
    Column("settings", Json, nullable=False),
    _to("labeller", nullable=True),  # who made it; NULL: a command
    Column("created", Float, nullable=False),
    UniqueConstraint("project_id", "version"),
)
members = Table(  # who sees a project that not everybody sees
    "members",
    metadata,
    Column("project_id", ForeignKey("projects.id"), primary_key=True),
    Column("labeller_id", ForeignKey("labellers.id"), primary_key=True),
    Index(None, "labeller_id"),
)
sessions = Table(
    "sessions",
    metadata,
    Column("token_hash", String(64), primary_key=True),
    _to("labeller"),
    Column("expires", Float, nullable=False),
)
tasks = Table(
    "tasks",
    metadata,
    _id(),
    _to("project"),
    _to("prompt"),
    Column("key", String(32), nullable=False),  # hash of kind, prompt and responses
    Column("kind", String(20), nullable=False),  # real, gold, repeat, practice
    Column("response_ids", Json, nullable=False),
    Column("need", Integer),  # labellers needed; NULL: each labeller once (gold)
    Column("taken", Integer, nullable=False),  # leases out, plus annotations
    Column("done", Integer, nullable=False),  # assignments with an annotation
    Column("priority", Integer, nullable=False),  # higher comes first
    Column("draw", Float, nullable=False),  # random order, [0, 1)
    Column("uncertainty", Float, nullable=False),  # of a reward-model ensemble
    Column("gap", Float, nullable=False),  # largest difference of predicted rewards
    Column("gold_tiers", Json),  # of gold and practice: the order that is known
    Column("reason", Json),  # of practice: why that order
    # What the newest annotations say of it together (labelling.store.settling).
    Column("disagreement", Float),  # 1 - mean pair agreement; NULL with fewer than two labellers
    Column("flagged", Integer, nullable=False, server_default="0"),  # with flags or a comment
    Column("skipped", Integer, nullable=False, server_default="0"),  # by how many
    Column("adjudicated", Boolean, nullable=False, server_default=false()),
    Column("repeat_of", ForeignKey("tasks.id")),
    _to("labeller", nullable=True),  # whom a repeat is for
    UniqueConstraint("project_id", "key"),
    Index(None, "prompt_id"),
    Index("ix_tasks_repeat_of", "repeat_of", "labeller_id"),
)
# What hand-out walks along: open tasks only, in each strategy's order.
for _order in ("draw", "uncertainty", "gap"):
    Index(
        f"ix_tasks_open_{_order}",
        tasks.c.project_id,
        tasks.c.kind,
        tasks.c.priority.desc(),
        tasks.c[_order] if _order == "draw" else tasks.c[_order].desc(),
        sqlite_where=text("taken < need"),
        postgresql_where=text("taken < need"),
    )
Index(
    "ix_tasks_gold",
    tasks.c.project_id,
    tasks.c.draw,
    sqlite_where=text("need IS NULL"),
    postgresql_where=text("need IS NULL"),
)
# What the admin's pages walk along.
Index(
    "ix_tasks_lacking",
    *(tasks.c[_name] for _name in ("project_id", "kind", "done", "skipped")),
    sqlite_where=text("done < need"),
    postgresql_where=text("done < need"),
)
Index("ix_tasks_project", tasks.c.project_id, tasks.c.id)
Index(
    "ix_tasks_disputed",
    tasks.c.project_id,
    tasks.c.disagreement.desc(),
    tasks.c.id,
    sqlite_where=text("disagreement > 0"),
    postgresql_where=text("disagreement > 0"),
)
Index(
    "ix_tasks_flagged",
    tasks.c.project_id,
    tasks.c.id,
    sqlite_where=text("flagged > 0"),
    postgresql_where=text("flagged > 0"),
)
Index(
    "ix_tasks_adjudicated",
    tasks.c.project_id,
    tasks.c.id,
    sqlite_where=text("adjudicated = 1"),
    postgresql_where=text("adjudicated"),
)
assignments = Table(
    "assignments",
    metadata,
    _id(),
    _to("task"),
    _to("labeller"),
    Column("shown", Json, nullable=False),  # positions in response_ids, as shown
    Column("strategy", String(20), nullable=False),
    Column("state", String(20), nullable=False),  # open, done, skipped, expired
    Column("leased_until", Float, nullable=False),
    Column("version", Integer, nullable=False),  # of its newest annotation; 0 without one
    Column("draft", Json),
    Column("created", Float, nullable=False),
    UniqueConstraint("labeller_id", "task_id"),
    Index(None, "task_id"),
    Index("ix_assignments_state", "labeller_id", "state", "id"),
    Index(
        "ix_assignments_leased",
        "leased_until",
        sqlite_where=text("state = 'open'"),
        postgresql_where=text("state = 'open'"),
    ),
)
annotation_rows = Table(  # `annotations` is Python's own name in a module
    "annotations",
    metadata,
    _id(),
    _to("assignment"),
    Column("version", Integer, nullable=False),
    Column("tiers", Json),  # NULL where the task was skipped
    Column("ratings", Json),  # 1 to 7 a response, in rating mode
    Column("strength", Integer),  # 1 to 3, in pairwise mode
    Column("confidence", Integer),  # 1 to 3
    Column("all_bad", Boolean, nullable=False),
    Column("flags", Json, nullable=False),
    Column("comment", Json, nullable=False),
    Column("seconds", Float, nullable=False),  # the page was in view
    Column("request_id", String(64), nullable=False, unique=True),  # a repeated request adds none
    Column("created", Float, nullable=False),
    Column("project_version", Integer),  # which guidelines the page showed; NULL: not said
    UniqueConstraint("assignment_id", "version"),
    Index(None, "created"),
)
PACES = (5, 10, 20, 40, 80, 160)
"""Seconds that part quick tasks from slow ones."""
day_sums = Table(  # a labeller's day in a project, of newest versions (labelling.store.sums)
    "day_sums",
    metadata,
    Column("project_id", ForeignKey("projects.id"), primary_key=True),
    Column("day", Integer, primary_key=True, autoincrement=False),  # since 1970, UTC
    Column("labeller_id", ForeignKey("labellers.id"), primary_key=True),
    # Of all kinds of tasks; then of real ones alone.
    *(Column(name, Integer, nullable=False) for name in ("done", "skipped", "real")),
    # Of real ones that were done on the page.
    Column("annotations", Integer, nullable=False),
    Column("milliseconds", BigInteger, nullable=False),
    Column("shared", Integer, nullable=False),  # with a disagreement
    Column("agreed", BigInteger, nullable=False),  # 1 - disagreement, in parts of 10^9
    *(Column(f"pace_{pace}", Integer, nullable=False) for pace in PACES),  # in up to these seconds
)
events = Table(  # the audit log
    "events",
    metadata,
    _id(),
    Column("at", Float, nullable=False),
    _to("labeller", nullable=True),
    Column("action", String(40), nullable=False),
    Column("detail", Json, nullable=False),
    Index("ix_events_action", "action", "at"),
)
