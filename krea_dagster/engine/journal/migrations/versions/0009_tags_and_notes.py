"""Verdicts get tags and a note. The verdicts of before have neither."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Add the columns."""
    op.add_column("verdicts", sa.Column("note", sa.Text(), nullable=True))
    op.add_column("verdicts", sa.Column("tags", sa.Text(), nullable=True))
    op.add_column(
        "verdicts",
        sa.Column("annotates", sa.Boolean(), nullable=False, server_default=sa.false()),
    )
