"""A revision that forgets the rows which belong to those that it removes."""

from __future__ import annotations

from alembic import op

from krea_dagster.engine.journal.migrations import REVISIONS

revision = "next"
down_revision = REVISIONS.head


def upgrade() -> None:
    op.execute("delete from requests")
