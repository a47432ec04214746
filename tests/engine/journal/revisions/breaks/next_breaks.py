"""A revision that fails after several changes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from krea_dagster.engine.journal.migrations import REVISIONS

revision = "next"
down_revision = REVISIONS.head


def upgrade() -> None:
    with op.batch_alter_table("requests") as requests:
        requests.add_column(sa.Column("archived_at", sa.BigInteger()))
    op.execute("delete from events")
    op.drop_table("prices")
    op.execute("update requests set state = 'no such state'")
