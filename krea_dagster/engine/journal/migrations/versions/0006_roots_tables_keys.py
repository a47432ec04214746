"""What a journal knows of its storage roots, its prompt tables and its API keys.

Every image of before lies in one root, whose place the journal did not keep: it is entered without
a location, and the first root in which its files are found is taken for it. The same holds for the
first prompt table. Claims of before are given up: no run of an older version may be at work while
a journal is upgraded, and what such a run has bought is found as unanswered.
"""

from __future__ import annotations

import time
from uuid import uuid4

import sqlalchemy as sa
from alembic import op

from krea_dagster.errors import JournalError

revision = "0006"
down_revision = "0005"

#: A run that was heard of within this time may be at work.
_SILENCE_US = 90_000_000

_TRANSITIONS = (
    *((state, "found", "stored") for state in (
        "planned", "deferred", "submitting", "unknown", "submitted", "completed", "stored",
        "expired", "failed", "refused",
    )),
    ("failed", "completed", "completed"),
    ("submitted", "outcome_unknown", "unknown"),
    ("expired", "accepted", "submitted"),
)  # fmt: skip


def upgrade() -> None:
    """Make the tables, and change those that get to know more."""
    op.create_table(
        "roots",
        sa.Column("root_id", sa.String(length=32), nullable=False),
        sa.Column("location", sa.Text(), nullable=False),
        sa.Column("adopts", sa.Boolean(), nullable=False),
        sa.Column("first_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("root_id", name=op.f("pk_roots")),
    )
    op.create_table(
        "root_tokens",
        sa.Column(
            "number",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        sa.Column("token", sa.String(length=32), nullable=False),
        sa.Column("root_id", sa.String(length=32), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["root_id"], ["roots.root_id"], name=op.f("fk_root_tokens_root_id")
        ),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_root_tokens")),
        sa.UniqueConstraint("token", name=op.f("uq_root_tokens_token")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "prompt_tables",
        sa.Column("table_id", sa.String(length=32), nullable=False),
        sa.Column("root_id", sa.String(length=32), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("first_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("table_id", name=op.f("pk_prompt_tables")),
    )
    op.create_index("ix_prompt_tables_name", "prompt_tables", ["root_id", "name"], unique=True)
    op.create_table(
        "api_keys",
        sa.Column("fingerprint", sa.String(length=16), nullable=False),
        sa.Column("account", sa.String(length=16), nullable=False),
        sa.Column("first_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("fingerprint", name=op.f("pk_api_keys")),
    )
    op.create_table(
        "files",
        sa.Column("request_key", sa.String(length=64), nullable=False),
        sa.Column("root_id", sa.String(length=32), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("missing_since", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["request_key"], ["requests.request_key"], name=op.f("fk_files_request_key")
        ),
        sa.ForeignKeyConstraint(["root_id"], ["roots.root_id"], name=op.f("fk_files_root_id")),
        sa.PrimaryKeyConstraint("request_key", "root_id", name=op.f("pk_files")),
    )
    op.create_index("ix_files_root", "files", ["root_id", "at"], unique=False)
    _owners()
    _requests()
    op.add_column("submissions", _table_id())
    op.add_column("submissions", sa.Column("api_key", sa.String(length=16), nullable=True))
    op.add_column(
        "submissions",
        sa.Column("replayed", sa.Boolean(), nullable=False, server_default=sa.false()),
    )
    op.add_column("prices", sa.Column("doubted_units", sa.BigInteger(), nullable=True))
    op.add_column(
        "prices",
        sa.Column("doubted_in_row", sa.Integer(), nullable=False, server_default=sa.text("0")),
    )
    op.add_column("verdicts", _table_id())
    _attempts()
    _transitions()
    _stored_files()


def _table_id() -> sa.Column[str]:
    return sa.Column("table_id", sa.String(length=32), nullable=False, server_default=sa.text("''"))


def _owners() -> None:
    newest = op.get_bind().execute(sa.text("SELECT max(heartbeat_at) FROM owners")).scalar()
    if newest is not None and time.time() * 1_000_000 - newest < _SILENCE_US:
        raise JournalError(
            "a run of an earlier version of krea-dagster is at work, or was until a moment ago: "
            "its purchases would be repeated. Nothing was changed. Let it end, and try again two "
            "minutes later."
        )
    op.execute("UPDATE requests SET claimed_by = NULL")
    op.execute("DELETE FROM owners")
    with op.batch_alter_table("owners") as owners:
        owners.drop_column("pid_started")
        owners.add_column(sa.Column("since", sa.BigInteger(), nullable=False))


def _requests() -> None:
    with op.batch_alter_table("requests") as requests:
        requests.add_column(_table_id())
        requests.drop_constraint(op.f("ck_requests_sent_has_key"), type_="check")
        requests.create_check_constraint(
            op.f("ck_requests_sent_has_key"),
            "state in ('planned', 'deferred', 'stored', 'completed', 'expired') "
            "or idempotency_key is not null",
        )


def _attempts() -> None:
    """Copy both tables of attempts into ones whose rows belong to a prompt table."""
    for name in ("attempts", "raised_attempts"):
        op.rename_table(name, f"old_{name}")
        # PostgreSQL keeps a constraint's name when its table is renamed.
        if op.get_bind().dialect.name == "postgresql":
            op.execute(f"ALTER TABLE old_{name} DROP CONSTRAINT pk_{name}")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE old_attempts DROP CONSTRAINT ck_attempts_attempt")
    op.create_table(
        "attempts",
        *_slot(),
        sa.Column("draws", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("raised_by", sa.String(length=255), nullable=False),
        sa.CheckConstraint("attempt > 0", name=op.f("ck_attempts_attempt")),
        sa.PrimaryKeyConstraint("table_id", "prompt_id", "sample", name=op.f("pk_attempts")),
    )
    op.create_table(
        "raised_attempts",
        *_slot(),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("raised_by", sa.String(length=255), nullable=False),
        sa.Column("ended_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint(
            "table_id", "prompt_id", "sample", "attempt", name=op.f("pk_raised_attempts")
        ),
    )
    kept = "prompt_id, sample, attempt, at, raised_by"
    op.execute(f"INSERT INTO attempts (table_id, {kept}) SELECT '', {kept} FROM old_attempts")  # noqa: S608 - our own names
    # The wishes of before have ended: whether one was interrupted was not kept.
    op.execute(
        f"INSERT INTO raised_attempts (table_id, {kept}, ended_at) "  # noqa: S608 - as above
        f"SELECT '', {kept}, at FROM old_raised_attempts"
    )
    op.drop_table("old_attempts")
    op.drop_table("old_raised_attempts")


def _slot() -> tuple[sa.Column[str], sa.Column[str], sa.Column[int], sa.Column[int]]:
    return (
        sa.Column("table_id", sa.String(length=32), nullable=False),
        sa.Column("prompt_id", sa.Text(), nullable=False),
        sa.Column("sample", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
    )


def _transitions() -> None:
    transitions = sa.table(
        "transitions", sa.column("from_state"), sa.column("event"), sa.column("to_state")
    )
    op.bulk_insert(
        transitions,
        [
            {"from_state": before, "event": event, "to_state": after}
            for before, event, after in _TRANSITIONS
        ],
    )


def _stored_files() -> None:
    """Enter the files of before, in a root whose location is not known yet."""
    bind = op.get_bind()
    if bind.execute(sa.text("SELECT 1 FROM requests WHERE state = 'stored' LIMIT 1")).first():
        root_id = uuid4().hex
        bind.execute(
            sa.text(
                "INSERT INTO roots (root_id, location, adopts, first_at) "
                "SELECT :root, '', :no, min(updated_at) FROM requests"
            ),
            {"root": root_id, "no": False},
        )
        bind.execute(
            sa.text(
                "INSERT INTO files (request_key, root_id, at) SELECT request_key, :root, "
                "coalesce(stored_at, updated_at) FROM requests WHERE state = 'stored'"
            ),
            {"root": root_id},
        )
