"""Token ids of sampled answers."""

import sqlalchemy as sa
from alembic import op

from prefloop.labelling.store.schema import Json

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the store to this version."""
    op.add_column("responses", sa.Column("token_ids", Json(), nullable=True))
    op.add_column("responses", sa.Column("tokenizer", sa.String(length=40), nullable=True))


def downgrade() -> None:
    """Take it back."""
    op.drop_column("responses", "tokenizer")
    op.drop_column("responses", "token_ids")
