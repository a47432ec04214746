"""The callbacks that came in, and the address that a purchase told the server to call."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make the table, and add the column: empty for what was bought before."""
    op.add_column("submissions", sa.Column("callback_url", sa.Text(), nullable=True))
    op.create_table(
        "callbacks",
        sa.Column("request_key", sa.String(length=64), nullable=False),
        sa.Column("task_id", sa.String(length=128), nullable=True),
        sa.Column("first_at", sa.BigInteger(), nullable=False),
        sa.Column("last_at", sa.BigInteger(), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("count > 0", name=op.f("ck_callbacks_count")),
        sa.ForeignKeyConstraint(
            ["request_key"], ["requests.request_key"], name=op.f("fk_callbacks_request_key")
        ),
        sa.PrimaryKeyConstraint("request_key", name=op.f("pk_callbacks")),
    )
    op.create_index("ix_callbacks_last_at", "callbacks", ["last_at"], unique=False)
