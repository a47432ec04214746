"""Every regeneration of an image, and the run that requested it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Make the table, with the last time of each row's sample: the earlier ones are not known."""
    op.create_table(
        "raised_attempts",
        sa.Column("prompt_id", sa.Text(), nullable=False),
        sa.Column("sample", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("raised_by", sa.String(length=255), nullable=False),
        sa.PrimaryKeyConstraint("prompt_id", "sample", "attempt", name=op.f("pk_raised_attempts")),
    )
    columns = "prompt_id, sample, attempt, at, raised_by"
    op.execute(f"INSERT INTO raised_attempts ({columns}) SELECT {columns} FROM attempts")  # noqa: S608 - our own names
