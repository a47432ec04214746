"""The journal's tables: invariants as database constraints, so that no code can break them.

A change here needs a revision in ``migrations``.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any, Final

from sqlalchemy import (
    DDL,
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Dialect,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    event,
    false,
    text,
)

from krea_dagster.engine.states import State
from krea_dagster.engine.verdict import VERDICTS

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND: Final = timedelta(microseconds=1)


def microseconds(at: datetime) -> int:
    """Return a time as microseconds since 1970 in UTC."""
    return (at - _EPOCH) // _MICROSECOND


def time_of(at_us: int) -> datetime:
    """Return the time of a number of microseconds since 1970."""
    return _EPOCH + at_us * _MICROSECOND


class UtcTime(TypeDecorator[datetime]):
    """A time as microseconds since 1970 in UTC: exact, sortable, the same in every database."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:  # noqa: ARG002 - SQLAlchemy's signature
        """Convert a value for the column."""
        return None if value is None else microseconds(value)

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002 - SQLAlchemy's signature
        """Convert a value from the column."""
        return None if value is None else time_of(value)


#: The time of a PostgreSQL server, which all hosts share.
POSTGRES_NOW_US: Final = "CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint)"


def _one_of(column: str, names: list[str]) -> str:
    return f"{column} in ({', '.join(repr(name) for name in names)})"


metadata: Final = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

#: One row: a random name that identifies this journal, and the origin of its images.
about: Final = Table(
    "about",
    metadata,
    Column("journal_id", String(32), primary_key=True),
    Column("origin", String(255)),
)

#: The state machine, as rows: other events cannot be written. ``from_state`` is empty before the
#: first event.
transitions: Final = Table(
    "transitions",
    metadata,
    Column("from_state", String(16), primary_key=True),
    Column("event", String(24), primary_key=True),
    Column("to_state", String(16), primary_key=True),
)

#: The storage roots of this journal's images. ``location`` is the last known one, empty for a root
#: from before the journal had roots. ``adopts``: a person accepted it as it is, so it may contain
#: files that this journal does not know.
roots: Final = Table(
    "roots",
    metadata,
    Column("root_id", String(32), primary_key=True),
    Column("location", Text, nullable=False),
    Column("adopts", Boolean, nullable=False),
    Column("first_at", UtcTime, nullable=False),
)

#: One row per run that wrote into a root. Its token is written here first, and then into the root's
#: marker. So a marker with an unknown token shows that the journal is older than the root.
root_tokens: Final = Table(
    "root_tokens",
    metadata,
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("token", String(32), nullable=False, unique=True),
    Column("root_id", String(32), ForeignKey("roots.root_id"), nullable=False),
    Column("at", UtcTime, nullable=False),
    sqlite_autoincrement=True,
)

#: The prompt tables whose runs share this journal. ``root_id`` is the root that a relative path
#: starts at, and empty if the name alone identifies the table (an asset key prefix, a URL).
prompt_tables: Final = Table(
    "prompt_tables",
    metadata,
    Column("table_id", String(32), primary_key=True),
    Column("root_id", String(32), nullable=False),
    Column("name", Text, nullable=False),
    Column("first_at", UtcTime, nullable=False),
    Index("ix_prompt_tables_name", "root_id", "name", unique=True),
)

#: The API keys that images were bought with, as fingerprints, and the account of each.
api_keys: Final = Table(
    "api_keys",
    metadata,
    Column("fingerprint", String(16), primary_key=True),
    Column("account", String(16), nullable=False),
    Column("first_at", UtcTime, nullable=False),
)

#: One row per run that claims requests; a claim is valid while its owner is alive (``owners.py``).
#: The host, the process and the time are for people.
owners: Final = Table(
    "owners",
    metadata,
    Column("owner", String(64), primary_key=True),
    Column("run_id", String(255), nullable=False),
    Column("host", String(255), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("since", UtcTime, nullable=False),
    Column("heartbeat_at", UtcTime, nullable=False),
)

#: What the runs of an account have learned about its limits (``pace_sharing.py``). ``at_us`` is the
#: time of a clock that they share: PostgreSQL's, or the monotonic clock of SQLite's host.
paces: Final = Table(
    "paces",
    metadata,
    Column("account", String(16), primary_key=True),
    Column("kept", Text, nullable=False),
    Column("at_us", BigInteger, nullable=False),
)

#: How many tasks each run has in flight, and how many more it wants.
pace_leases: Final = Table(
    "pace_leases",
    metadata,
    Column("owner", String(64), ForeignKey("owners.owner", ondelete="CASCADE"), primary_key=True),
    Column("account", String(16), nullable=False),
    Column("in_flight", Integer, nullable=False),
    Column("wants", Integer, nullable=False),
    Column("at_us", BigInteger, nullable=False),
)

#: One row per requested image: the request, and its current state.
requests: Final = Table(
    "requests",
    metadata,
    Column("request_key", String(64), primary_key=True),
    Column("model", String(64), nullable=False),
    Column("prompt", Text, nullable=False),
    Column("size", String(8), nullable=False),
    Column("quality", String(8), nullable=False),
    Column("seed", Integer, nullable=False),
    Column("nsfw_check", Boolean, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("table_id", String(32), nullable=False, default="", server_default=text("''")),
    Column("partition_key", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("seq", Integer, nullable=False),
    # Events with lower numbers may have been removed (``prune.py``).
    Column("kept_from_seq", Integer, nullable=False, default=0, server_default=text("0")),
    Column("claimed_by", String(64), ForeignKey("owners.owner", ondelete="SET NULL")),
    Column("idempotency_key", String(96), unique=True),
    Column("result_url", Text),
    Column("completed_at", UtcTime),
    Column("stored_at", UtcTime),
    Column("image_path", Text),
    Column("image_sha256", String(64)),
    Column("image_bytes", BigInteger),
    Column("image_format", String(16)),
    Column("width", Integer),
    Column("height", Integer),
    Column("error_code", Text),
    Column("error_message", Text),
    Column("updated_at", UtcTime, nullable=False),
    CheckConstraint(_one_of("state", [state.value for state in State]), name="state"),
    CheckConstraint("seed between 1 and 1048576", name="seed"),
    CheckConstraint(
        "state <> 'stored' or (image_path is not null and image_sha256 is not null)",
        name="stored_has_file",
    ),
    # A request without a key was found in its root, and its purchase is not known.
    CheckConstraint(
        "state in ('planned', 'deferred', 'stored', 'completed', 'expired') "
        "or idempotency_key is not null",
        name="sent_has_key",
    ),
    Index("ix_requests_state", "state"),
    Index("ix_requests_claimed_by", "claimed_by"),
    Index("ix_requests_updated_at", "updated_at"),
    Index("ix_requests_attempt", "attempt"),
)

#: What purchases were made for: values of the columns that the user names, as a JSON object. The
#: number follows from the text, so that runs need not agree on it.
attributions: Final = Table(
    "attributions",
    metadata,
    Column("attribution_id", BigInteger, primary_key=True, autoincrement=False),
    Column("attributes", Text, nullable=False),
)

#: Who bought, by run and prompt table: what Dagster says of the run, and the tags (a JSON object)
#: that the user names.
buyers: Final = Table(
    "buyers",
    metadata,
    Column("run_id", String(255), primary_key=True),
    Column("table_id", String(32), primary_key=True),
    Column("asset", Text),
    Column("job", Text),
    Column("backfill", Text),
    Column("user_name", Text),
    Column("tags", Text),
)

#: One row per purchase, or possible purchase: the money.
submissions: Final = Table(
    "submissions",
    metadata,
    Column("idempotency_key", String(96), primary_key=True),
    Column("request_key", String(64), ForeignKey("requests.request_key"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("run_id", String(255), nullable=False),
    Column("table_id", String(32), nullable=False, default="", server_default=text("''")),
    Column("partition_key", Text, nullable=False),
    # The fingerprint of the API key that it was sent with; null in rows of older versions.
    Column("api_key", String(16)),
    Column("sent_at", UtcTime, nullable=False),
    Column("posts", Integer, nullable=False, default=1),
    Column("task_id", String(128), unique=True),
    Column("submitted_at", UtcTime),
    Column("expected_units", BigInteger, nullable=False),
    Column("committed_units", BigInteger, nullable=False),
    # The server recognised the Idempotency-Key of a first POST: another journal has bought it.
    Column("replayed", Boolean, nullable=False, default=False, server_default=false()),
    Column("reserved_units", BigInteger),
    Column("charged_units", BigInteger),
    Column("settled_at", UtcTime),
    # Text of the server, without a limit: a text that does not fit would lose the task's id.
    Column("billing_rule", Text),
    Column("user_group", Text),
    # Part of what was sent: a repeat under the same Idempotency-Key must send the same one.
    Column("callback_url", Text),
    # Scopes in addition to its run, day, month and partition, as a JSON list.
    Column("scopes", Text),
    # The row that it was bought for, and what that row said then; null in rows of older versions.
    Column("prompt_id", Text),
    Column("sample", Integer),
    Column("attribution_id", BigInteger),
    CheckConstraint("reserved_units >= 0", name="reserved"),
    CheckConstraint("charged_units >= 0", name="charged"),
    CheckConstraint("committed_units >= 0", name="committed"),
    Index("ix_submissions_request", "request_key", "number", unique=True),
)

#: The files in each root. ``missing_since``: when it was found missing.
files: Final = Table(
    "files",
    metadata,
    Column("request_key", String(64), ForeignKey("requests.request_key"), primary_key=True),
    Column("root_id", String(32), ForeignKey("roots.root_id"), primary_key=True),
    Column("at", UtcTime, nullable=False),
    Column("missing_since", UtcTime),
    Index("ix_files_root", "root_id", "at"),
)

#: Files that a person had removed. The request stays stored, and is neither fetched nor bought
#: again. ``root_id`` is the root that had the file, and ``why`` what was pruned.
pruned_files: Final = Table(
    "pruned_files",
    metadata,
    Column("request_key", String(64), ForeignKey("requests.request_key"), primary_key=True),
    Column("root_id", String(32), ForeignKey("roots.root_id"), nullable=False),
    Column("at", UtcTime, nullable=False),
    Column("why", String(16), nullable=False),
)

#: What each scope (run, UTC day, month, partition, budgeted value) has committed and spent: the
#: sums that caps and budgets are checked against.
commitments: Final = Table(
    "commitments",
    metadata,
    Column("scope", String(300), primary_key=True),
    Column("committed_units", BigInteger, nullable=False),
    Column("spent_units", BigInteger, nullable=False),
)

#: The highest plausible price of each quality, and the last implausible one, which is far from the
#: others and ignored until a person accepts it.
prices: Final = Table(
    "prices",
    metadata,
    Column("quality", String(8), primary_key=True),
    Column("highest_units", BigInteger, nullable=False),
    Column("latest_units", BigInteger, nullable=False),
    Column("doubted_units", BigInteger),
    # How many prices in a row were implausible, over all runs.
    Column("doubted_in_row", Integer, nullable=False, default=0, server_default=text("0")),
    Column("seen_at", UtcTime, nullable=False),
)

#: Launches (a run, or the runs of one backfill) whose buying the account has stopped.
stops: Final = Table(
    "stops",
    metadata,
    Column("launch", String(255), primary_key=True),
    Column("at", UtcTime, nullable=False),
    Column("error_code", Text, nullable=False),
    Column("error_message", Text, nullable=False),
)

#: How often another image was requested for a row's sample, by table. ``draws``: its seed is drawn,
#: even if the table fixes one.
attempts: Final = Table(
    "attempts",
    metadata,
    Column("table_id", String(32), primary_key=True),
    Column("prompt_id", Text, primary_key=True),
    Column("sample", Integer, primary_key=True),
    Column("attempt", Integer, nullable=False),
    Column("draws", Boolean, nullable=False, default=False, server_default=false()),
    Column("at", UtcTime, nullable=False),
    Column("raised_by", String(255), nullable=False),
    CheckConstraint("attempt > 0", name="attempt"),
)

#: Every raised attempt, and the run that raised it: a run that is executed again does not raise it
#: again. ``ended_at`` is when a run ended with that attempt; until then it is open, and is
#: continued instead of raised again.
raised_attempts: Final = Table(
    "raised_attempts",
    metadata,
    Column("table_id", String(32), primary_key=True),
    Column("prompt_id", Text, primary_key=True),
    Column("sample", Integer, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("at", UtcTime, nullable=False),
    Column("raised_by", String(255), nullable=False),
    Column("ended_at", UtcTime),
)

#: What the account reported, to compare the journal with it. ``api_key`` is the fingerprint of the
#: key that asked; null where a row of an older version does not show it.
account_readings: Final = Table(
    "account_readings",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at", UtcTime, nullable=False),
    Column("run_id", String(255), nullable=False),
    Column("used_units", BigInteger, nullable=False),
    Column("remaining_units", BigInteger, nullable=False),
    Column("api_key", String(16)),
)

#: Warnings about the spend that are alerts, by the channel that posts them. ``warning`` is a JSON
#: object. The row is removed when the warning is posted and no longer found, so that the next one
#: is posted again.
spend_alerts: Final = Table(
    "spend_alerts",
    metadata,
    Column("channel", String(255), primary_key=True),
    Column("warning_id", String(16), primary_key=True),
    Column("warning", Text, nullable=False),
    Column("seen_at", UtcTime, nullable=False),
    Column("claimed_by", String(64), ForeignKey("owners.owner", ondelete="SET NULL")),
    Column("posted_at", UtcTime),
)

#: Received callbacks by request: hints from anyone who knows the address, not facts.
callbacks: Final = Table(
    "callbacks",
    metadata,
    Column("request_key", String(64), ForeignKey("requests.request_key"), primary_key=True),
    # The task of the last callback that named one.
    Column("task_id", String(128)),
    Column("first_at", UtcTime, nullable=False),
    Column("last_at", UtcTime, nullable=False),
    Column("count", BigInteger, nullable=False),
    CheckConstraint("count > 0", name="count"),
    Index("ix_callbacks_last_at", "last_at"),
)

#: Verdicts of people on images, in order: the last one on an image counts, with its tags and its
#: note. Triggers prevent changes and removals. A verdict belongs to the file with this hash; the
#: other columns say what the file was made for at the time.
verdicts: Final = Table(
    "verdicts",
    metadata,
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("verdict_id", String(64), nullable=False, unique=True),
    Column("image_sha256", String(64), nullable=False),
    Column("verdict", String(8), nullable=False),
    Column("reason", Text),
    Column("reviewer", String(255), nullable=False),
    Column("at", UtcTime, nullable=False),
    Column("request_key", String(64), nullable=False),
    Column("prompt_id", Text, nullable=False),
    Column("sample", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("partition_key", Text, nullable=False),
    Column("table_id", String(32), nullable=False, default="", server_default=text("''")),
    Column("note", Text),
    # Separated by commas; null, as in older rows, means none.
    Column("tags", Text),
    # Whether only tags or note are new: verdict and reason repeat those of the row before.
    Column("annotates", Boolean, nullable=False, default=False, server_default=false()),
    CheckConstraint(_one_of("verdict", list(VERDICTS)), name="verdict"),
    Index("ix_verdicts_image", "image_sha256", "number"),
    Index("ix_verdicts_prompt_id", "prompt_id"),
    sqlite_autoincrement=True,
)

#: What a person entered of the account: refunds, credits bought or given, corrections. Triggers
#: prevent changes and removals: a wrong entry is reversed by another. ``day`` is YYYY-MM-DD,
#: ``paid_units`` are 1/10,000 of the currency.
account_entries: Final = Table(
    "account_entries",
    metadata,
    Column("entry_id", String(64), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("day", String(10), nullable=False),
    Column("units", BigInteger, nullable=False),
    Column("paid_units", BigInteger),
    Column("currency", String(3)),
    Column("reference", Text),
    Column("note", Text),
    Column("idempotency_key", String(96), ForeignKey("submissions.idempotency_key")),
    Column("reverses", String(64), ForeignKey("account_entries.entry_id"), unique=True),
    Column("entered_at", UtcTime, nullable=False),
    CheckConstraint(
        "kind = 'correction' or (kind in ('top-up', 'promotion', 'refund') and units > 0)",
        name="kind",
    ),
    CheckConstraint("reverses is null or kind = 'correction'", name="reverses"),
    CheckConstraint("(paid_units is null) = (currency is null)", name="paid"),
    Index("ix_account_entries_purchase", "idempotency_key"),
)

#: What a person acknowledged of the warnings about the spend; the last row of a warning counts, and
#: one without a reason withdraws the one before. Triggers prevent changes and removals. ``text`` is
#: what the warning said, where that was known.
spend_acknowledgements: Final = Table(
    "spend_acknowledgements",
    metadata,
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("warning_id", String(16), nullable=False),
    Column("reason", Text),
    Column("person", String(255), nullable=False),
    Column("at", UtcTime, nullable=False),
    Column("text", Text),
    sqlite_autoincrement=True,
)

#: The months that were closed: the statement of each, and the hashes of its files.
closed_months: Final = Table(
    "closed_months",
    metadata,
    Column("month", String(7), primary_key=True),
    Column("closed_at", UtcTime, nullable=False),
    # Under the storage root, without .parquet and .html.
    Column("name", Text, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("page_sha256", String(64), nullable=False),
    Column("purchases", BigInteger, nullable=False),
    Column("charged_units", BigInteger, nullable=False),
    Column("refunded_units", BigInteger, nullable=False),
    Column("at_stake_units", BigInteger, nullable=False),
    # What it changes of earlier statements.
    Column("adjusted_charged_units", BigInteger, nullable=False),
    Column("adjusted_refunded_units", BigInteger, nullable=False),
)


def _keep_rows(table: Table, function: str, message: str) -> None:
    """Make a table append-only, by triggers that are created with it."""
    statements = {
        "sqlite": [
            f"CREATE TRIGGER {table.name}_before_{change} BEFORE {change.upper()} ON {table.name} "
            f"BEGIN SELECT RAISE(ABORT, '{message}'); END"
            for change in ("update", "delete")
        ],
        "postgresql": [
            (
                f"CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $$ "
                f"BEGIN RAISE EXCEPTION '{message}'; END $$"
            ),
            (
                f"CREATE TRIGGER {table.name}_before_change BEFORE UPDATE OR DELETE OR TRUNCATE "
                f"ON {table.name} FOR EACH STATEMENT EXECUTE FUNCTION {function}()"
            ),
        ],
    }
    for kind, made in statements.items():
        for statement in made:
            make = DDL(statement)  # type: ignore[no-untyped-call]  # SQLAlchemy's has no types
            event.listen(table, "after_create", make.execute_if(dialect=kind))


_keep_rows(verdicts, "verdicts_are_kept", "a verdict is never changed or removed; give another one")
_keep_rows(
    account_entries,
    "account_entries_are_kept",
    "an entry is never changed or removed; enter a correction that reverses it",
)
_keep_rows(
    spend_acknowledgements,
    "spend_acknowledgements_are_kept",
    "an acknowledgement is never changed or removed; withdraw it",
)
_keep_rows(
    closed_months,
    "closed_months_are_kept",
    "a closed month stays closed; later changes are adjustments in the next statement",
)

#: Everything that happened, in order; replaying it gives the current state. Events before the
#: ``kept_from_seq`` of a request may have been removed.
events: Final = Table(
    "events",
    metadata,
    Column("request_key", String(64), ForeignKey("requests.request_key"), primary_key=True),
    Column("seq", Integer, primary_key=True),
    Column("at", UtcTime, nullable=False),
    Column("run_id", String(255), nullable=False),
    Column("from_state", String(16), nullable=False),
    Column("event", String(24), nullable=False),
    Column("to_state", String(16), nullable=False),
    Column("idempotency_key", String(96)),
    Column("data", JSON(none_as_null=True)),
    ForeignKeyConstraint(
        ["from_state", "event", "to_state"],
        ["transitions.from_state", "transitions.event", "transitions.to_state"],
    ),
)
