"""The tables as they were first released, and the state machine of that release."""

from __future__ import annotations

from uuid import uuid4

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "about",
        sa.Column("journal_id", sa.String(length=32), nullable=False),
        sa.Column("origin", sa.String(length=255), nullable=True),
        sa.PrimaryKeyConstraint("journal_id", name=op.f("pk_about")),
    )
    op.create_table(
        "account_readings",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("run_id", sa.String(length=255), nullable=False),
        sa.Column("used_units", sa.BigInteger(), nullable=False),
        sa.Column("remaining_units", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_account_readings")),
    )
    op.create_table(
        "attempts",
        sa.Column("prompt_id", sa.Text(), nullable=False),
        sa.Column("sample", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("raised_by", sa.String(length=255), nullable=False),
        sa.CheckConstraint("attempt > 0", name=op.f("ck_attempts_attempt")),
        sa.PrimaryKeyConstraint("prompt_id", "sample", name=op.f("pk_attempts")),
    )
    op.create_table(
        "commitments",
        sa.Column("scope", sa.String(length=300), nullable=False),
        sa.Column("committed_units", sa.BigInteger(), nullable=False),
        sa.Column("spent_units", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("scope", name=op.f("pk_commitments")),
    )
    op.create_table(
        "owners",
        sa.Column("owner", sa.String(length=64), nullable=False),
        sa.Column("run_id", sa.String(length=255), nullable=False),
        sa.Column("host", sa.String(length=255), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("pid_started", sa.BigInteger(), nullable=False),
        sa.Column("heartbeat_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("owner", name=op.f("pk_owners")),
    )
    op.create_table(
        "prices",
        sa.Column("quality", sa.String(length=8), nullable=False),
        sa.Column("highest_units", sa.BigInteger(), nullable=False),
        sa.Column("latest_units", sa.BigInteger(), nullable=False),
        sa.Column("seen_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("quality", name=op.f("pk_prices")),
    )
    op.create_table(
        "stops",
        sa.Column("launch", sa.String(length=255), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("error_code", sa.Text(), nullable=False),
        sa.Column("error_message", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("launch", name=op.f("pk_stops")),
    )
    op.create_table(
        "transitions",
        sa.Column("from_state", sa.String(length=16), nullable=False),
        sa.Column("event", sa.String(length=24), nullable=False),
        sa.Column("to_state", sa.String(length=16), nullable=False),
        sa.PrimaryKeyConstraint("from_state", "event", "to_state", name=op.f("pk_transitions")),
    )
    op.create_table(
        "requests",
        sa.Column("request_key", sa.String(length=64), nullable=False),
        sa.Column("model", sa.String(length=64), nullable=False),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("size", sa.String(length=8), nullable=False),
        sa.Column("quality", sa.String(length=8), nullable=False),
        sa.Column("seed", sa.Integer(), nullable=False),
        sa.Column("nsfw_check", sa.Boolean(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("partition_key", sa.Text(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("claimed_by", sa.String(length=64), nullable=True),
        sa.Column("idempotency_key", sa.String(length=96), nullable=True),
        sa.Column("result_url", sa.Text(), nullable=True),
        sa.Column("completed_at", sa.BigInteger(), nullable=True),
        sa.Column("stored_at", sa.BigInteger(), nullable=True),
        sa.Column("image_path", sa.Text(), nullable=True),
        sa.Column("image_sha256", sa.String(length=64), nullable=True),
        sa.Column("image_bytes", sa.BigInteger(), nullable=True),
        sa.Column("image_format", sa.String(length=16), nullable=True),
        sa.Column("width", sa.Integer(), nullable=True),
        sa.Column("height", sa.Integer(), nullable=True),
        sa.Column("error_code", sa.Text(), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "state <> 'stored' or (image_path is not null and image_sha256 is not null)",
            name=op.f("ck_requests_stored_has_file"),
        ),
        sa.CheckConstraint(
            "state in ('planned', 'deferred') or idempotency_key is not null",
            name=op.f("ck_requests_sent_has_key"),
        ),
        sa.CheckConstraint(
            "state in ('planned', 'submitting', 'submitted', 'completed', 'stored', 'failed', "
            "'expired', 'refused', 'unknown', 'deferred')",
            name=op.f("ck_requests_state"),
        ),
        sa.CheckConstraint("seed between 1 and 1048576", name=op.f("ck_requests_seed")),
        sa.ForeignKeyConstraint(
            ["claimed_by"],
            ["owners.owner"],
            name=op.f("fk_requests_claimed_by"),
            ondelete="SET NULL",
        ),
        sa.PrimaryKeyConstraint("request_key", name=op.f("pk_requests")),
        sa.UniqueConstraint("idempotency_key", name=op.f("uq_requests_idempotency_key")),
    )
    op.create_index("ix_requests_claimed_by", "requests", ["claimed_by"], unique=False)
    op.create_index("ix_requests_state", "requests", ["state"], unique=False)
    op.create_table(
        "events",
        sa.Column("request_key", sa.String(length=64), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("run_id", sa.String(length=255), nullable=False),
        sa.Column("from_state", sa.String(length=16), nullable=False),
        sa.Column("event", sa.String(length=24), nullable=False),
        sa.Column("to_state", sa.String(length=16), nullable=False),
        sa.Column("idempotency_key", sa.String(length=96), nullable=True),
        sa.Column("data", sa.JSON(none_as_null=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["from_state", "event", "to_state"],
            ["transitions.from_state", "transitions.event", "transitions.to_state"],
            name=op.f("fk_events_from_state"),
        ),
        sa.ForeignKeyConstraint(
            ["request_key"], ["requests.request_key"], name=op.f("fk_events_request_key")
        ),
        sa.PrimaryKeyConstraint("request_key", "seq", name=op.f("pk_events")),
    )
    op.create_table(
        "submissions",
        sa.Column("idempotency_key", sa.String(length=96), nullable=False),
        sa.Column("request_key", sa.String(length=64), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.String(length=255), nullable=False),
        sa.Column("partition_key", sa.Text(), nullable=False),
        sa.Column("sent_at", sa.BigInteger(), nullable=False),
        sa.Column("posts", sa.Integer(), nullable=False),
        sa.Column("task_id", sa.String(length=128), nullable=True),
        sa.Column("submitted_at", sa.BigInteger(), nullable=True),
        sa.Column("expected_units", sa.BigInteger(), nullable=False),
        sa.Column("committed_units", sa.BigInteger(), nullable=False),
        sa.Column("reserved_units", sa.BigInteger(), nullable=True),
        sa.Column("charged_units", sa.BigInteger(), nullable=True),
        sa.Column("settled_at", sa.BigInteger(), nullable=True),
        sa.Column("billing_rule", sa.Text(), nullable=True),
        sa.Column("user_group", sa.Text(), nullable=True),
        sa.CheckConstraint("charged_units >= 0", name=op.f("ck_submissions_charged")),
        sa.CheckConstraint("committed_units >= 0", name=op.f("ck_submissions_committed")),
        sa.CheckConstraint("reserved_units >= 0", name=op.f("ck_submissions_reserved")),
        sa.ForeignKeyConstraint(
            ["request_key"], ["requests.request_key"], name=op.f("fk_submissions_request_key")
        ),
        sa.PrimaryKeyConstraint("idempotency_key", name=op.f("pk_submissions")),
        sa.UniqueConstraint("task_id", name=op.f("uq_submissions_task_id")),
    )
    op.create_index("ix_submissions_request", "submissions", ["request_key", "number"], unique=True)
    about = sa.table("about", sa.column("journal_id"))
    op.bulk_insert(about, [{"journal_id": uuid4().hex}])
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


_TRANSITIONS = (
    ("", "planned", "planned"),
    ("planned", "submitting", "submitting"),
    ("planned", "deferred", "deferred"),
    ("deferred", "submitting", "submitting"),
    ("deferred", "deferred", "deferred"),
    ("submitting", "accepted", "submitted"),
    ("submitting", "turned_away", "planned"),
    ("submitting", "refused", "refused"),
    ("submitting", "deferred", "deferred"),
    ("submitting", "outcome_unknown", "unknown"),
    ("unknown", "replaying", "unknown"),
    ("unknown", "outcome_unknown", "unknown"),
    ("unknown", "accepted", "submitted"),
    ("unknown", "released", "planned"),
    ("unknown", "expired", "expired"),
    ("submitted", "completed", "completed"),
    ("submitted", "failed", "failed"),
    ("submitted", "expired", "expired"),
    ("completed", "completed", "completed"),
    ("completed", "not_stored", "completed"),
    ("completed", "stored", "stored"),
    ("completed", "expired", "expired"),
    ("expired", "completed", "completed"),
    ("expired", "failed", "failed"),
    ("stored", "file_missing", "completed"),
    ("failed", "planned", "planned"),
    ("refused", "planned", "planned"),
)
