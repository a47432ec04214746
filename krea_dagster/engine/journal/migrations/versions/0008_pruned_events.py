"""Events of stored requests can be removed: each request knows the first event that is kept."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Add the column: so far, all events are kept."""
    op.add_column(
        "requests",
        sa.Column("kept_from_seq", sa.Integer(), nullable=False, server_default=sa.text("0")),
    )
