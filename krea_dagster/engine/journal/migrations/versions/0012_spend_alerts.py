"""Warnings about the spend that are posted once."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "spend_alerts",
        sa.Column("channel", sa.String(length=255), nullable=False),
        sa.Column("warning_id", sa.String(length=16), nullable=False),
        sa.Column("warning", sa.Text(), nullable=False),
        sa.Column("seen_at", sa.BigInteger(), nullable=False),
        sa.Column("claimed_by", sa.String(length=64), nullable=True),
        sa.Column("posted_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["claimed_by"],
            ["owners.owner"],
            name=op.f("fk_spend_alerts_claimed_by"),
            ondelete="SET NULL",
        ),
        sa.PrimaryKeyConstraint("channel", "warning_id", name=op.f("pk_spend_alerts")),
    )
