"""Practice tasks say why their order is right."""

import sqlalchemy as sa
from alembic import op

from prefloop.labelling.store.schema import Json

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the store to this version."""
    op.add_column("tasks", sa.Column("reason", Json(), nullable=True))


def downgrade() -> None:
    """Take it back."""
    op.drop_column("tasks", "reason")
