"""The journal: what was requested, what was paid, and everything that happened, in SQL.

SQLite by default, PostgreSQL where several machines share it. Each change checks the present state,
appends an event and updates the current state in one transaction; constraints of the tables also
enforce legality and uniqueness. The methods block: ``group_commit.GroupCommit`` gathers the changes
of many requests into one commit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from types import MappingProxyType
from typing import Any, Final

from sqlalchemy import Connection, func, insert, select, update

from krea_dagster.engine.budget import Caps, Commitment
from krea_dagster.engine.journal.acknowledgement_log import AcknowledgementLog
from krea_dagster.engine.journal.alert_log import AlertLog
from krea_dagster.engine.journal.api_key_log import ApiKeyLog
from krea_dagster.engine.journal.append import StaleRecord, write_changes
from krea_dagster.engine.journal.attempt_log import AttemptLog
from krea_dagster.engine.journal.attribution_log import AttributionLog
from krea_dagster.engine.journal.balance_log import BalanceLog
from krea_dagster.engine.journal.callback_log import CallbackLog
from krea_dagster.engine.journal.changes import Change
from krea_dagster.engine.journal.claim_log import ClaimLog
from krea_dagster.engine.journal.closed_month_log import ClosedMonthLog
from krea_dagster.engine.journal.commitments import CommitmentLedger
from krea_dagster.engine.journal.database import Database
from krea_dagster.engine.journal.entry_log import EntryLog
from krea_dagster.engine.journal.pace_log import PaceLog
from krea_dagster.engine.journal.price_log import PriceLog
from krea_dagster.engine.journal.prompt_table_log import PromptTableLog
from krea_dagster.engine.journal.pruned_file_log import PrunedFileLog
from krea_dagster.engine.journal.root_log import RootLog
from krea_dagster.engine.journal.rows import (
    CHARGES,
    RECORDS,
    Charge,
    charge_from_row,
    chunks,
    read_records,
    record_from_row,
    rows_with,
)
from krea_dagster.engine.journal.schema import (
    about,
    account_readings,
    commitments,
    events,
    requests,
    stops,
    submissions,
)
from krea_dagster.engine.journal.snapshot import Snapshot
from krea_dagster.engine.journal.sql import (
    defer_requests,
    insert_planned,
    insertion,
    remove_old_stops,
)
from krea_dagster.engine.journal.verdict_log import VerdictLog
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import AT_STAKE, Event, State
from krea_dagster.errors import BuyingClosed, ConfigError, JournalError
from krea_dagster.models import AccountCredits, ImageRequest

NO_CAPS: Final = Caps()


class Journal:
    """The journal in the database behind a SQLAlchemy URL.

    Raises JournalError if the database cannot be read or written: an unreadable journal means stop,
    never that nothing was bought. ``lock_timeout_s`` is how long SQLite waits for another process
    that writes.

    Attributes:
        database: the connections.
        acknowledgements: the warnings about the spend that people expect.
        alerts: the warnings about the spend that are to be posted.
        api_keys: the API keys that images were bought with.
        balances: what the accounts had left.
        callbacks: the callbacks that receivers have written.
        claims: the runs that are at work, and the requests that they hold.
        closed_months: the months that were closed.
        entries: what a person entered of the account.
        paces: the rate limits that runs have learned.
        prices: the prices that EvoLink has reported.
        pruned: the files that a person had removed.
        roots: the storage roots that contain the images.
        tables: the prompt tables whose runs share the journal.
        verdicts: the verdicts of people on images.
    """

    def __init__(self, url: str, *, lock_timeout_s: float = 60.0) -> None:
        database = Database(url, lock_timeout_s=lock_timeout_s)
        self.database = database
        self.acknowledgements = AcknowledgementLog(database)
        self.alerts = AlertLog(database)
        self.api_keys = ApiKeyLog(database)
        self.balances = BalanceLog(database)
        self.callbacks = CallbackLog(database)
        self.attributions = AttributionLog(database)
        self.claims = ClaimLog(database)
        self.closed_months = ClosedMonthLog(database)
        self.entries = EntryLog(database)
        self.paces = PaceLog(database)
        self.prices = PriceLog(database, self.claims)
        self.pruned = PrunedFileLog(database)
        self.roots = RootLog(database)
        self.tables = PromptTableLog(database)
        self.verdicts = VerdictLog(database)

    def __repr__(self) -> str:
        return f"Journal({self.database.where!r})"

    def attempts(self, table_id: str) -> AttemptLog:
        """Return the attempts of the images of a prompt table."""
        return AttemptLog(self.database, table_id)

    def close(self) -> None:
        """Close the connections."""
        self.database.close()

    def bind(self, origin: str) -> None:
        """Bind the journal to the origin that its images are bought from, for good.

        An image is found by its request, so a journal must not mix an emulator's images with
        EvoLink's. Raises ConfigError if the journal is bound to another origin.
        """

        def write(connection: Connection) -> str | None:
            connection.execute(update(about).where(about.c.origin.is_(None)).values(origin=origin))
            return connection.execute(select(about.c.origin)).scalar()

        self._check_origin(self.database.write("bind", write) or "", origin)

    def check_origin(self, origin: str) -> None:
        """Check what ``bind`` would, and bind nothing. Raises ConfigError."""
        self._check_origin(self.origin(), origin)

    def _check_origin(self, bound: str, origin: str) -> None:
        if bound and bound != origin:
            raise ConfigError(
                f"the journal {self.database.where} holds images from {bound}, and this run would "
                f"buy from {origin}. Nothing was bought. Use another storage root "
                "(KREA_STORAGE) or another journal (KREA_JOURNAL_URL)."
            )

    def origin(self) -> str:
        """Return what the journal is bound to: a host, or "an emulator"; empty if unbound."""
        ((origin,),) = self.database.fetch(select(about.c.origin))
        return origin or ""

    # -- requests -----------------------------------------------------------------------------

    def plan(
        self,
        wanted: Iterable[tuple[ImageRequest, str]],
        *,
        run_id: str,
        at: datetime,
        table_id: str = "",
    ) -> int:
        """Enter new requests as planned, and return how many were new.

        ``wanted`` are pairs of a request and the partition key of the first row that wants it, in
        the prompt table ``table_id``.
        """
        rows = {
            request.request_key: {
                **vars(request),
                "table_id": table_id,
                "partition_key": partition_key,
                "state": State.PLANNED.value,
                "seq": 0,
                "updated_at": at,
            }
            # In the order of the keys, so that two runs do not deadlock.
            for request, partition_key in sorted(wanted, key=lambda pair: pair[0].request_key)
        }

        def write(connection: Connection) -> int:
            return sum(
                insert_planned(connection, chunk, run_id, at) for chunk in chunks(rows.values())
            )

        return self.database.write("plan requests in", write)

    def defer(
        self,
        keys: Iterable[str],
        *,
        code: str,
        message: str,
        owner: str,
        run_id: str,
        at: datetime,
    ) -> None:
        """Note why requests were not bought, unless the same reason is noted already.

        Two statements write many requests. Requests that another run holds are left alone.
        """

        def write(connection: Connection) -> None:
            for chunk in chunks(sorted(keys)):
                defer_requests(
                    connection,
                    chunk,
                    owner,
                    run_id,
                    {"updated_at": at, "error_code": code, "error_message": message},
                )

        self.database.write("defer requests in", write)

    def records(self, keys: Iterable[str]) -> dict[str, Record]:
        """Return the requests with these keys; unknown keys are left out."""
        with self.database.read() as connection:
            return read_records(connection, keys)

    def all_records(self) -> Iterator[Record]:
        """Yield every request, in the order of their keys."""
        with self.snapshot() as snapshot:
            yield from snapshot.records()

    def known_task_ids(self, task_ids: Iterable[str | None]) -> set[str]:
        """Return which of these tasks belong to a submission."""
        wanted = sorted({task_id for task_id in task_ids if task_id is not None})
        task_id = submissions.c.task_id
        with self.database.read() as connection:
            rows = rows_with(connection, select(task_id), task_id, wanted)
            return {row.task_id for row in rows}

    def unsettled(self) -> list[Record]:
        """Return the requests that are paid, or may be, and have no image yet; oldest first."""
        return self._oldest_first(requests.c.state.in_([state.value for state in AT_STAKE]))

    def expired_since(self, since: datetime) -> list[Record]:
        """Return the requests sent since then that are paid and lost, but have a task to read.

        The oldest comes first.
        """
        return self._oldest_first(
            requests.c.state == State.EXPIRED.value,
            submissions.c.task_id.is_not(None),
            submissions.c.sent_at >= since,
        )

    def _oldest_first(self, *conditions: Any) -> list[Record]:
        query = RECORDS.where(*conditions).order_by(submissions.c.sent_at)
        return [record_from_row(row) for row in self.database.fetch(query)]

    def unattended(self) -> list[Record]:
        """Return the unsettled requests that no living run holds; oldest first."""
        dead = self.claims.dead()
        return [
            record
            for record in self.unsettled()
            if record.claimed_by is None or record.claimed_by in dead
        ]

    def has_requests(self) -> bool:
        """Return whether the journal knows a request. Reads one row."""
        return bool(self.database.fetch(select(requests.c.request_key).limit(1)))

    def count_by_state(self) -> dict[State, int]:
        """Return how many requests are in each state; states without any are left out."""
        query = select(requests.c.state, func.count()).group_by(requests.c.state)
        return {State(state): count for state, count in self.database.fetch(query)}

    def history(self, request_key: str) -> list[tuple[datetime, Event, Mapping[str, Any]]]:
        """Return the events of a request in order: time, event, and the data kept with it."""
        query = (
            select(events.c.at, events.c.event, events.c.data)
            .where(events.c.request_key == request_key)
            .order_by(events.c.seq)
        )
        return [(at, Event(name), data or {}) for at, name, data in self.database.fetch(query)]

    def append(
        self,
        changes: Sequence[Change],
        *,
        owner: str,
        run_id: str,
        caps: Caps = NO_CAPS,
        launch: str = "",
        root_id: str = "",
        known: Mapping[str, Record] = MappingProxyType({}),
        repeated: bool = False,
    ) -> list[Record | JournalError | BuyingClosed]:
        """Write the events of several requests in one commit.

        Returns, for each change, the new record or the reason why it was not written:
        IllegalTransition; TakenOver, if another run holds the request; BuyingClosed, if ``caps``
        leave no room for a purchase or the account has stopped the ``launch``; TaskTaken, if the
        task that the server named belongs to another purchase. The other changes are written.
        Raises JournalError if nothing could be written.

        Args:
            changes: the events.
            owner: the owner that must hold the requests.
            run_id: the run that writes.
            caps: the caps that purchases must fit into.
            launch: the launch that the run is a shard of; by default the run itself.
            root_id: the storage root that events of files belong to.
            known: records, by request key, from the caller's last changes. They are not read again,
                unless they turn out to be out of date.
            repeated: the connection broke when the same changes were given before, so that they may
                have been written.
        """

        def write(
            known: Mapping[str, Record], connection: Connection
        ) -> list[Record | JournalError | BuyingClosed]:
            ledger = CommitmentLedger(connection, caps, run_id=run_id, launch=launch or run_id)
            return write_changes(
                connection,
                ledger,
                changes,
                owner=owner,
                run_id=run_id,
                root_id=root_id,
                known=known,
                repeated=repeated,
            )

        try:
            return self.database.write("write to", partial(write, {} if repeated else known))
        except StaleRecord:
            return self.database.write("write to", partial(write, {}))

    # -- money --------------------------------------------------------------------------------

    def charges(self) -> list[Charge]:
        """Return every submission, in the order of their first POSTs."""
        query = CHARGES.order_by(submissions.c.sent_at, submissions.c.idempotency_key)
        return [charge_from_row(row) for row in self.database.fetch(query)]

    def commitment(self, scope: str) -> Commitment:
        """Return what a scope (``budget.scopes_of``), such as a day, has committed and spent."""
        columns = commitments.c.committed_units, commitments.c.spent_units
        rows = self.database.fetch(select(*columns).where(commitments.c.scope == scope))
        return Commitment(*rows[0]) if rows else Commitment()

    def stop(self, launch: str, code: str, message: str, at: datetime) -> None:
        """Tell all shards of a launch that the account has stopped the buying.

        PostgreSQL uses the time of its own clock instead of ``at``.
        """
        written = at if self.database.sqlite else self.database.locks.now()
        values = {"launch": launch, "at": written, "error_code": code, "error_message": message}

        def write(connection: Connection) -> None:
            remove_old_stops(connection, at)
            statement = insertion(connection, stops).values(values)
            connection.execute(
                statement.on_conflict_do_update(index_elements=["launch"], set_=values)
            )

        self.database.write("write a stop to", write)

    def add_account_reading(
        self, run_id: str, said: AccountCredits, api_key: str | None = None
    ) -> None:
        """Keep what the account reported to a key, to compare the journal with it."""
        used = said.token_used_units
        statement = insert(account_readings).values(
            at=said.read_at,
            run_id=run_id,
            used_units=said.user_used_units if used is None else used,
            remaining_units=said.user_remaining_units,
            api_key=api_key,
        )
        self.database.write(
            "write an account reading to", lambda connection: connection.execute(statement)
        )

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """Yield the journal at this moment, for reads that belong together.

        Later writes are not visible. Errors of the caller are not changed.
        """
        with self.database.snapshot() as connection:
            yield Snapshot(connection, self.database.translated_errors)
