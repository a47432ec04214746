"""The verdicts on images, which nothing changes or removes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_SAID = "a verdict is never changed or removed; give another one"
_APPEND_ONLY = {
    "sqlite": tuple(
        f"CREATE TRIGGER verdicts_before_{change} BEFORE {change.upper()} ON verdicts BEGIN "
        f"SELECT RAISE(ABORT, '{_SAID}'); END"
        for change in ("update", "delete")
    ),
    "postgresql": (
        f"""
        CREATE OR REPLACE FUNCTION verdicts_are_kept() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION '{_SAID}';
        END $$
        """,
        """
        CREATE TRIGGER verdicts_before_change BEFORE UPDATE OR DELETE OR TRUNCATE ON verdicts
        FOR EACH STATEMENT EXECUTE FUNCTION verdicts_are_kept()
        """,
    ),
}


def upgrade() -> None:
    """Make the table, and the triggers that keep its rows."""
    op.create_table(
        "verdicts",
        sa.Column(
            "number",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        sa.Column("verdict_id", sa.String(length=64), nullable=False),
        sa.Column("image_sha256", sa.String(length=64), nullable=False),
        sa.Column("verdict", sa.String(length=8), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("reviewer", sa.String(length=255), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("request_key", sa.String(length=64), nullable=False),
        sa.Column("prompt_id", sa.Text(), nullable=False),
        sa.Column("sample", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("partition_key", sa.Text(), nullable=False),
        sa.CheckConstraint(
            "verdict in ('keep', 'reject', 'flag', 'none')", name=op.f("ck_verdicts_verdict")
        ),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_verdicts")),
        sa.UniqueConstraint("verdict_id", name=op.f("uq_verdicts_verdict_id")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_verdicts_image", "verdicts", ["image_sha256", "number"], unique=False)
    op.create_index("ix_verdicts_prompt_id", "verdicts", ["prompt_id"], unique=False)
    for statement in _APPEND_ONLY.get(op.get_bind().dialect.name, ()):
        op.execute(statement)
