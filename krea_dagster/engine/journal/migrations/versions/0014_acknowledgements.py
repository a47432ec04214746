"""What a person acknowledged of the warnings about the spend, which nothing changes or removes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"

_SAID = "an acknowledgement is never changed or removed; withdraw it"
_APPEND_ONLY = {
    "sqlite": tuple(
        f"CREATE TRIGGER spend_acknowledgements_before_{change} BEFORE {change.upper()} "
        f"ON spend_acknowledgements BEGIN SELECT RAISE(ABORT, '{_SAID}'); END"
        for change in ("update", "delete")
    ),
    "postgresql": (
        (
            "CREATE OR REPLACE FUNCTION spend_acknowledgements_are_kept() RETURNS trigger "
            f"LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION '{_SAID}'; END $$"
        ),
        (
            "CREATE TRIGGER spend_acknowledgements_before_change BEFORE UPDATE OR DELETE OR "
            "TRUNCATE ON spend_acknowledgements FOR EACH STATEMENT "
            "EXECUTE FUNCTION spend_acknowledgements_are_kept()"
        ),
    ),
}


def upgrade() -> None:
    """Make the table, and the triggers that keep its rows."""
    op.create_table(
        "spend_acknowledgements",
        sa.Column(
            "number",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        sa.Column("warning_id", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("person", sa.String(length=255), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("text", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_spend_acknowledgements")),
        sqlite_autoincrement=True,
    )
    for statement in _APPEND_ONLY.get(op.get_bind().dialect.name, ()):
        op.execute(statement)
