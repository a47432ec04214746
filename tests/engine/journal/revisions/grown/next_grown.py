"""A revision of a later version: a new state, its transitions, and a column."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from krea_dagster.engine.journal.migrations import REVISIONS

revision = "next"
down_revision = REVISIONS.head

_STATES = (
    "planned",
    "submitting",
    "submitted",
    "completed",
    "stored",
    "failed",
    "expired",
    "refused",
    "unknown",
    "deferred",
    "archived",
)


def upgrade() -> None:
    with op.batch_alter_table("requests") as requests:
        requests.add_column(sa.Column("archived_at", sa.BigInteger()))
        requests.drop_constraint(op.f("ck_requests_state"), type_="check")
        requests.create_check_constraint(op.f("ck_requests_state"), f"state in {_STATES!r}")
    transitions = sa.table(
        "transitions", sa.column("from_state"), sa.column("event"), sa.column("to_state")
    )
    op.bulk_insert(
        transitions, [{"from_state": "stored", "event": "archived", "to_state": "archived"}]
    )
