"""What each labeller did on each day, and how many tasks a project has, summed."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

COUNTS = ("done", "skipped", "real", "annotations", "shared")
PACES = ("pace_5", "pace_10", "pace_20", "pace_40", "pace_80", "pace_160")
ADDED = (("projects", "tasks"), ("projects", "needed"), ("tasks", "skipped"))
FILL = """
INSERT INTO day_sums (project_id, day, labeller_id, done, skipped, real, annotations, milliseconds,
                      shared, agreed, pace_5, pace_10, pace_20, pace_40, pace_80, pace_160)
SELECT project_id, day, labeller_id, sum(done), sum(1 - done), sum(real), sum(page),
       sum(page * milliseconds), sum(page * shared), sum(page * shared * agreed),
       sum(CASE WHEN seconds <= 5 THEN page ELSE 0 END),
       sum(CASE WHEN seconds <= 10 THEN page ELSE 0 END),
       sum(CASE WHEN seconds <= 20 THEN page ELSE 0 END),
       sum(CASE WHEN seconds <= 40 THEN page ELSE 0 END),
       sum(CASE WHEN seconds <= 80 THEN page ELSE 0 END),
       sum(CASE WHEN seconds <= 160 THEN page ELSE 0 END)
FROM (
    SELECT t.project_id, a.labeller_id, n.seconds,
           CAST(floor(n.created / 86400.0) AS INTEGER) AS day,
           CASE WHEN a.state = 'done' THEN 1 ELSE 0 END AS done,
           CASE WHEN a.state = 'done' AND t.kind = 'real' THEN 1 ELSE 0 END AS real,
           CASE WHEN a.state = 'done' AND t.kind = 'real' AND a.strategy != 'import'
                THEN 1 ELSE 0 END AS page,
           CAST(floor(1000.0 * n.seconds + 0.5) AS BIGINT) AS milliseconds,
           CASE WHEN t.disagreement IS NULL THEN 0 ELSE 1 END AS shared,
           CAST(floor(1e9 * (1.0 - coalesce(t.disagreement, 0.0)) + 0.5) AS BIGINT) AS agreed
    FROM annotations n
    JOIN assignments a ON a.id = n.assignment_id AND a.version = n.version
    JOIN tasks t ON t.id = a.task_id
    WHERE a.state IN ('done', 'skipped') AND a.strategy != 'adjudication'
) said
GROUP BY project_id, day, labeller_id
"""


def upgrade() -> None:
    """Bring the store to this version."""
    op.create_table(
        "day_sums",
        sa.Column("project_id", sa.Integer(), nullable=False),
        sa.Column("day", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("labeller_id", sa.Integer(), nullable=False),
        *(sa.Column(name, sa.Integer(), nullable=False) for name in (*COUNTS, *PACES)),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in ("milliseconds", "agreed")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name="fk_day_sums_project_id"),
        sa.ForeignKeyConstraint(["labeller_id"], ["labellers.id"], name="fk_day_sums_labeller_id"),
        sa.PrimaryKeyConstraint("project_id", "day", "labeller_id", name="pk_day_sums"),
    )
    op.execute(FILL)
    for table, column in ADDED:
        op.add_column(table, sa.Column(column, sa.Integer(), nullable=False, server_default="0"))
    op.execute(
        "UPDATE projects SET tasks = (SELECT count(*) FROM tasks WHERE project_id = projects.id "
        "AND kind = 'real'), needed = (SELECT coalesce(sum(need), 0) FROM tasks "
        "WHERE project_id = projects.id AND kind = 'real')"
    )
    op.execute(
        "UPDATE tasks SET skipped = (SELECT count(*) FROM assignments WHERE task_id = tasks.id "
        "AND state = 'skipped') WHERE id IN (SELECT task_id FROM assignments "
        "WHERE state = 'skipped')"
    )
    lacking = sa.text("done < need")
    op.create_index(
        "ix_tasks_lacking", "tasks", ["project_id", "kind", "done", "skipped"],
        sqlite_where=lacking, postgresql_where=lacking,
    )  # fmt: skip


def downgrade() -> None:
    """Take it back."""
    op.drop_index("ix_tasks_lacking", table_name="tasks")
    for table, column in ADDED:
        op.drop_column(table, column)
    op.drop_table("day_sums")
