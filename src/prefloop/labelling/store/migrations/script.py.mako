"""${message}."""

from alembic import op
import sqlalchemy as sa
from prefloop.labelling.store.schema import Json

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the store to this version."""
    ${upgrades}
