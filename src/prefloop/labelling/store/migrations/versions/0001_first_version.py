"""First version."""

import sqlalchemy as sa
from alembic import op

from prefloop.labelling.store.schema import Json

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the store to this version."""
    op.create_table(
        "labellers",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("role", sa.String(length=20), nullable=False),
        sa.Column("token_hash", sa.String(length=64), nullable=False),
        sa.Column("active", sa.Boolean(), nullable=False),
        sa.Column("handed", sa.Integer(), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_labellers"),
        sa.UniqueConstraint("name", name="uq_labellers_name"),
        sa.UniqueConstraint("token_hash", name="uq_labellers_token_hash"),
    )
    op.create_table(
        "projects",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("mode", sa.String(length=20), nullable=False),
        sa.Column("guidelines", sa.Text(), nullable=False),
        sa.Column("settings", Json(), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_projects"),
        sa.UniqueConstraint("name", name="uq_projects_name"),
    )
    op.create_table(
        "snapshots",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("weights", sa.String(length=64), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_snapshots"),
        sa.UniqueConstraint("model", "weights", name="uq_snapshots_model_weights"),
    )
    op.create_table(
        "events",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("labeller_id", sa.Integer(), nullable=True),
        sa.Column("action", sa.String(length=40), nullable=False),
        sa.Column("detail", Json(), nullable=False),
        sa.ForeignKeyConstraint(["labeller_id"], ["labellers.id"], name="fk_events_labeller_id"),
        sa.PrimaryKeyConstraint("id", name="pk_events"),
    )
    op.create_index("ix_events_action", "events", ["action", "at"], unique=False)
    op.create_table(
        "prompts",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("project_id", sa.Integer(), nullable=False),
        sa.Column("key", sa.String(length=32), nullable=False),
        sa.Column("prompt", Json(), nullable=False),
        sa.Column("extra", Json(), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name="fk_prompts_project_id"),
        sa.PrimaryKeyConstraint("id", name="pk_prompts"),
        sa.UniqueConstraint("project_id", "key", name="uq_prompts_project_id_key"),
    )
    op.create_table(
        "sessions",
        sa.Column("token_hash", sa.String(length=64), nullable=False),
        sa.Column("labeller_id", sa.Integer(), nullable=False),
        sa.Column("expires", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["labeller_id"], ["labellers.id"], name="fk_sessions_labeller_id"),
        sa.PrimaryKeyConstraint("token_hash", name="pk_sessions"),
    )
    op.create_table(
        "responses",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("prompt_id", sa.Integer(), nullable=False),
        sa.Column("snapshot_id", sa.Integer(), nullable=True),
        sa.Column("completion", Json(), nullable=False),
        sa.Column("sampling", Json(), nullable=True),
        sa.Column("seed", sa.Integer(), nullable=True),
        sa.Column("log_prob", sa.Float(), nullable=True),
        sa.Column("finish_reason", sa.String(length=40), nullable=True),
        sa.Column("scores", Json(), nullable=True),
        sa.ForeignKeyConstraint(["prompt_id"], ["prompts.id"], name="fk_responses_prompt_id"),
        sa.ForeignKeyConstraint(["snapshot_id"], ["snapshots.id"], name="fk_responses_snapshot_id"),
        sa.PrimaryKeyConstraint("id", name="pk_responses"),
    )
    op.create_index("ix_responses_prompt_id", "responses", ["prompt_id"], unique=False)
    op.create_table(
        "tasks",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("project_id", sa.Integer(), nullable=False),
        sa.Column("prompt_id", sa.Integer(), nullable=False),
        sa.Column("key", sa.String(length=32), nullable=False),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("response_ids", Json(), nullable=False),
        sa.Column("need", sa.Integer(), nullable=True),
        sa.Column("taken", sa.Integer(), nullable=False),
        sa.Column("done", sa.Integer(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("draw", sa.Float(), nullable=False),
        sa.Column("uncertainty", sa.Float(), nullable=False),
        sa.Column("gap", sa.Float(), nullable=False),
        sa.Column("gold_tiers", Json(), nullable=True),
        sa.Column("repeat_of", sa.Integer(), nullable=True),
        sa.Column("labeller_id", sa.Integer(), nullable=True),
        sa.ForeignKeyConstraint(["labeller_id"], ["labellers.id"], name="fk_tasks_labeller_id"),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name="fk_tasks_project_id"),
        sa.ForeignKeyConstraint(["prompt_id"], ["prompts.id"], name="fk_tasks_prompt_id"),
        sa.ForeignKeyConstraint(["repeat_of"], ["tasks.id"], name="fk_tasks_repeat_of"),
        sa.PrimaryKeyConstraint("id", name="pk_tasks"),
        sa.UniqueConstraint("project_id", "key", name="uq_tasks_project_id_key"),
    )
    op.create_index(
        "ix_tasks_gold",
        "tasks",
        ["project_id", "draw"],
        unique=False,
        sqlite_where=sa.text("need IS NULL"),
        postgresql_where=sa.text("need IS NULL"),
    )
    op.create_index(
        "ix_tasks_open_draw",
        "tasks",
        ["project_id", "kind", sa.literal_column("priority DESC"), "draw"],
        unique=False,
        sqlite_where=sa.text("taken < need"),
        postgresql_where=sa.text("taken < need"),
    )
    op.create_index(
        "ix_tasks_open_gap",
        "tasks",
        ["project_id", "kind", sa.literal_column("priority DESC"), sa.literal_column("gap DESC")],
        unique=False,
        sqlite_where=sa.text("taken < need"),
        postgresql_where=sa.text("taken < need"),
    )
    op.create_index(
        "ix_tasks_open_uncertainty",
        "tasks",
        [
            "project_id",
            "kind",
            sa.literal_column("priority DESC"),
            sa.literal_column("uncertainty DESC"),
        ],
        unique=False,
        sqlite_where=sa.text("taken < need"),
        postgresql_where=sa.text("taken < need"),
    )
    op.create_index("ix_tasks_prompt_id", "tasks", ["prompt_id"], unique=False)
    op.create_index("ix_tasks_repeat_of", "tasks", ["repeat_of", "labeller_id"], unique=False)
    op.create_table(
        "assignments",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("task_id", sa.Integer(), nullable=False),
        sa.Column("labeller_id", sa.Integer(), nullable=False),
        sa.Column("shown", Json(), nullable=False),
        sa.Column("strategy", sa.String(length=20), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("leased_until", sa.Float(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("draft", Json(), nullable=True),
        sa.Column("created", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["labeller_id"], ["labellers.id"], name="fk_assignments_labeller_id"
        ),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.id"], name="fk_assignments_task_id"),
        sa.PrimaryKeyConstraint("id", name="pk_assignments"),
        sa.UniqueConstraint("labeller_id", "task_id", name="uq_assignments_labeller_id_task_id"),
    )
    op.create_index(
        "ix_assignments_leased",
        "assignments",
        ["leased_until"],
        unique=False,
        sqlite_where=sa.text("state = 'open'"),
        postgresql_where=sa.text("state = 'open'"),
    )
    op.create_index(
        "ix_assignments_state", "assignments", ["labeller_id", "state", "id"], unique=False
    )
    op.create_index("ix_assignments_task_id", "assignments", ["task_id"], unique=False)
    op.create_table(
        "annotations",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("assignment_id", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("tiers", Json(), nullable=True),
        sa.Column("ratings", Json(), nullable=True),
        sa.Column("strength", sa.Integer(), nullable=True),
        sa.Column("confidence", sa.Integer(), nullable=True),
        sa.Column("all_bad", sa.Boolean(), nullable=False),
        sa.Column("flags", Json(), nullable=False),
        sa.Column("comment", Json(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["assignment_id"], ["assignments.id"], name="fk_annotations_assignment_id"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_annotations"),
        sa.UniqueConstraint(
            "assignment_id", "version", name="uq_annotations_assignment_id_version"
        ),
        sa.UniqueConstraint("request_id", name="uq_annotations_request_id"),
    )
