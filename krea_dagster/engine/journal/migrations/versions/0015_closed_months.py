"""The months that were closed, which nothing changes or removes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"

_SAID = "a closed month stays closed; later changes are adjustments in the next statement"
_APPEND_ONLY = {
    "sqlite": tuple(
        f"CREATE TRIGGER closed_months_before_{change} BEFORE {change.upper()} ON closed_months "
        f"BEGIN SELECT RAISE(ABORT, '{_SAID}'); END"
        for change in ("update", "delete")
    ),
    "postgresql": (
        (
            "CREATE OR REPLACE FUNCTION closed_months_are_kept() RETURNS trigger LANGUAGE plpgsql "
            f"AS $$ BEGIN RAISE EXCEPTION '{_SAID}'; END $$"
        ),
        (
            "CREATE TRIGGER closed_months_before_change BEFORE UPDATE OR DELETE OR TRUNCATE "
            "ON closed_months FOR EACH STATEMENT EXECUTE FUNCTION closed_months_are_kept()"
        ),
    ),
}
_UNITS = (
    *("purchases", "charged_units", "refunded_units", "at_stake_units"),
    *("adjusted_charged_units", "adjusted_refunded_units"),
)


def upgrade() -> None:
    """Make the table, and the triggers that keep its rows."""
    op.create_table(
        "closed_months",
        sa.Column("month", sa.String(length=7), nullable=False),
        sa.Column("closed_at", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("page_sha256", sa.String(length=64), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in _UNITS),
        sa.PrimaryKeyConstraint("month", name=op.f("pk_closed_months")),
    )
    for statement in _APPEND_ONLY.get(op.get_bind().dialect.name, ()):
        op.execute(statement)
