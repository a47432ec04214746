"""A revision that leaves rows that refer to removed ones."""

from __future__ import annotations

from alembic import op

from krea_dagster.engine.journal.migrations import REVISIONS

revision = "next"
down_revision = REVISIONS.head


def upgrade() -> None:
    op.execute("delete from requests")
