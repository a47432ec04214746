"""What a purchase was made for is written with it: the row, the user's columns, and who bought."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Make the tables and columns. What earlier purchases were made for stays unknown."""
    op.create_table(
        "attributions",
        sa.Column("attribution_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("attributes", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("attribution_id", name=op.f("pk_attributions")),
    )
    op.create_table(
        "buyers",
        sa.Column("run_id", sa.String(length=255), nullable=False),
        sa.Column("table_id", sa.String(length=32), nullable=False),
        sa.Column("asset", sa.Text(), nullable=True),
        sa.Column("job", sa.Text(), nullable=True),
        sa.Column("backfill", sa.Text(), nullable=True),
        sa.Column("user_name", sa.Text(), nullable=True),
        sa.Column("tags", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("run_id", "table_id", name=op.f("pk_buyers")),
    )
    op.add_column("submissions", sa.Column("prompt_id", sa.Text(), nullable=True))
    op.add_column("submissions", sa.Column("sample", sa.Integer(), nullable=True))
    op.add_column("submissions", sa.Column("attribution_id", sa.BigInteger(), nullable=True))
    op.create_index("ix_requests_attempt", "requests", ["attempt"])
