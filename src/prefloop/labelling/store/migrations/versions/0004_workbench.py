"""Versions of projects, who sees them, and what a task's annotations say of it together."""

from itertools import combinations, groupby
from typing import Any

import sqlalchemy as sa
from alembic import op

from prefloop.labelling.store.schema import Json

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

ROWS = 2000


def upgrade() -> None:
    """Bring the store to this version."""
    op.create_table(
        "project_versions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("project_id", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("guidelines", sa.Text(), nullable=False),
        sa.Column("settings", Json(), nullable=False),
        sa.Column("labeller_id", sa.Integer(), nullable=True),
        sa.Column("created", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name="fk_project_versions_project_id"
        ),
        sa.ForeignKeyConstraint(
            ["labeller_id"], ["labellers.id"], name="fk_project_versions_labeller_id"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_project_versions"),
        sa.UniqueConstraint("project_id", "version", name="uq_project_versions_project_id_version"),
    )
    op.create_table(
        "members",
        sa.Column("project_id", sa.Integer(), nullable=False),
        sa.Column("labeller_id", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name="fk_members_project_id"),
        sa.ForeignKeyConstraint(["labeller_id"], ["labellers.id"], name="fk_members_labeller_id"),
        sa.PrimaryKeyConstraint("project_id", "labeller_id", name="pk_members"),
    )
    op.create_index("ix_members_labeller_id", "members", ["labeller_id"])
    added: dict[str, list[sa.Column[Any]]] = {
        "projects": [
            sa.Column("version", sa.Integer(), nullable=False, server_default="1"),
            sa.Column("members_only", sa.Boolean(), nullable=False, server_default=sa.false()),
        ],
        "tasks": [
            sa.Column("disagreement", sa.Float(), nullable=True),
            sa.Column("flagged", sa.Integer(), nullable=False, server_default="0"),
            sa.Column("adjudicated", sa.Boolean(), nullable=False, server_default=sa.false()),
        ],
        "annotations": [sa.Column("project_version", sa.Integer(), nullable=True)],
    }
    for table, columns in added.items():
        for column in columns:
            op.add_column(table, column)
    _fill()
    op.create_index("ix_annotations_created", "annotations", ["created"])
    op.create_index("ix_tasks_project", "tasks", ["project_id", "id"])
    worst: list[Any] = ["project_id", sa.literal_column("disagreement DESC"), "id"]
    plain: list[Any] = ["project_id", "id"]
    for name, columns, on_sqlite, on_postgresql in (
        ("disputed", worst, "disagreement > 0", "disagreement > 0"),
        ("flagged", plain, "flagged > 0", "flagged > 0"),
        ("adjudicated", plain, "adjudicated = 1", "adjudicated"),
    ):
        op.create_index(
            f"ix_tasks_{name}",
            "tasks",
            columns,
            sqlite_where=sa.text(on_sqlite),
            postgresql_where=sa.text(on_postgresql),
        )


def _fill() -> None:
    """What stands in the store already."""
    connection = op.get_bind()
    connection.execute(
        sa.text(
            "INSERT INTO project_versions (project_id, version, guidelines, settings, created) "
            "SELECT id, 1, guidelines, settings, created FROM projects"
        )
    )
    connection.execute(
        sa.text(
            "UPDATE labellers SET role = 'adjudicator' WHERE EXISTS (SELECT 1 FROM assignments "
            "WHERE labeller_id = labellers.id AND strategy = 'adjudication') AND NOT active"
        )
    )
    said = sa.text(
        "SELECT t.id, t.kind, a.strategy, n.tiers, n.flags, n.comment FROM tasks t "
        "JOIN assignments a ON a.task_id = t.id "
        "JOIN annotations n ON n.assignment_id = a.id AND n.version = a.version ORDER BY t.id"
    ).columns(
        *(sa.column(name) for name in ("id", "kind", "strategy")),
        *(sa.column(name, Json()) for name in ("tiers", "flags", "comment")),
    )
    change = sa.text(
        "UPDATE tasks SET disagreement = :disagreement, flagged = :flagged, "
        "adjudicated = :adjudicated WHERE id = :task"
    )
    found = connection.execute(said, execution_options={"yield_per": 5000})
    changes = []
    for task, group in groupby(found, key=lambda row: row.id):
        rows = list(group)
        orders = [r.tiers for r in rows if r.tiers is not None and r.strategy != "adjudication"]
        values = {
            "disagreement": _disagreement(orders) if rows[0].kind == "real" else None,
            "flagged": sum(bool(r.flags or r.comment) for r in rows),
            "adjudicated": any(r.strategy == "adjudication" and r.tiers is not None for r in rows),
        }
        if any(values.values()) or values["disagreement"] is not None:
            changes.append({"task": task, **values})
    for start in range(0, len(changes), ROWS):
        connection.execute(change, changes[start : start + ROWS])


def _disagreement(orders: list[list[list[int]]]) -> float | None:
    """1 minus the mean pair agreement of every two labellers."""
    if len(orders) < 2:
        return None
    places = [{i: place for place, tier in enumerate(tiers) for i in tier} for tiers in orders]
    signs = [[(p[j] > p[i]) - (p[j] < p[i]) for i, j in combinations(sorted(p), 2)] for p in places]
    apart = [
        sum(abs(x - y) for x, y in zip(a, b, strict=True)) / (2 * len(a))
        for a, b in combinations(signs, 2)
    ]
    return round(sum(apart) / len(apart), 9)


def downgrade() -> None:
    """Take it back."""
    for table, name in (
        ("tasks", "ix_tasks_disputed"),
        ("tasks", "ix_tasks_flagged"),
        ("tasks", "ix_tasks_adjudicated"),
        ("tasks", "ix_tasks_project"),
        ("annotations", "ix_annotations_created"),
    ):
        op.drop_index(name, table_name=table)
    for table, column in (
        ("annotations", "project_version"),
        ("tasks", "adjudicated"),
        ("tasks", "flagged"),
        ("tasks", "disagreement"),
        ("projects", "members_only"),
        ("projects", "version"),
    ):
        op.drop_column(table, column)
    op.drop_table("members")
    op.drop_table("project_versions")
