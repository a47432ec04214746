"""Files of images that a person had removed, and that are neither fetched nor bought again."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "pruned_files",
        sa.Column("request_key", sa.String(length=64), nullable=False),
        sa.Column("root_id", sa.String(length=32), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("why", sa.String(length=16), nullable=False),
        sa.ForeignKeyConstraint(
            ["request_key"], ["requests.request_key"], name=op.f("fk_pruned_files_request_key")
        ),
        sa.ForeignKeyConstraint(
            ["root_id"], ["roots.root_id"], name=op.f("fk_pruned_files_root_id")
        ),
        sa.PrimaryKeyConstraint("request_key", name=op.f("pk_pruned_files")),
    )
