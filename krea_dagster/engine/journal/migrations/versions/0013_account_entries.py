"""What a person enters of the account, which nothing changes or removes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"

_SAID = "an entry is never changed or removed; enter a correction that reverses it"
_APPEND_ONLY = {
    "sqlite": tuple(
        f"CREATE TRIGGER account_entries_before_{change} BEFORE {change.upper()} "
        f"ON account_entries BEGIN SELECT RAISE(ABORT, '{_SAID}'); END"
        for change in ("update", "delete")
    ),
    "postgresql": (
        (
            "CREATE OR REPLACE FUNCTION account_entries_are_kept() RETURNS trigger "
            f"LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION '{_SAID}'; END $$"
        ),
        (
            "CREATE TRIGGER account_entries_before_change BEFORE UPDATE OR DELETE OR TRUNCATE "
            "ON account_entries FOR EACH STATEMENT EXECUTE FUNCTION account_entries_are_kept()"
        ),
    ),
}


def upgrade() -> None:
    """Make the table, and the triggers that keep its rows."""
    op.create_table(
        "account_entries",
        sa.Column("entry_id", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("day", sa.String(length=10), nullable=False),
        sa.Column("units", sa.BigInteger(), nullable=False),
        sa.Column("paid_units", sa.BigInteger(), nullable=True),
        sa.Column("currency", sa.String(length=3), nullable=True),
        sa.Column("reference", sa.Text(), nullable=True),
        sa.Column("note", sa.Text(), nullable=True),
        sa.Column("idempotency_key", sa.String(length=96), nullable=True),
        sa.Column("reverses", sa.String(length=64), nullable=True),
        sa.Column("entered_at", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "kind = 'correction' or (kind in ('top-up', 'promotion', 'refund') and units > 0)",
            name=op.f("ck_account_entries_kind"),
        ),
        sa.CheckConstraint(
            "reverses is null or kind = 'correction'", name=op.f("ck_account_entries_reverses")
        ),
        sa.CheckConstraint(
            "(paid_units is null) = (currency is null)", name=op.f("ck_account_entries_paid")
        ),
        sa.ForeignKeyConstraint(
            ["idempotency_key"],
            ["submissions.idempotency_key"],
            name=op.f("fk_account_entries_idempotency_key"),
        ),
        sa.ForeignKeyConstraint(
            ["reverses"],
            ["account_entries.entry_id"],
            name=op.f("fk_account_entries_reverses"),
        ),
        sa.PrimaryKeyConstraint("entry_id", name=op.f("pk_account_entries")),
        sa.UniqueConstraint("reverses", name=op.f("uq_account_entries_reverses")),
    )
    op.create_index("ix_account_entries_purchase", "account_entries", ["idempotency_key"])
    for statement in _APPEND_ONLY.get(op.get_bind().dialect.name, ()):
        op.execute(statement)
