"""The journal: what was asked for, what was paid, and everything that happened, in SQL.

SQLite by default, PostgreSQL when several machines share it. Each change checks the present
state, appends an event and updates the current state in one transaction; legality and
uniqueness are constraints of the tables besides. The methods block: ``writer.GroupCommit``
gathers the changes of many requests into one commit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, Final

from sqlalchemy import Connection, Table, delete, func, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from krea_dagster.engine import schema
from krea_dagster.engine.attempts import AttemptLog
from krea_dagster.engine.batch import OutOfDate, write_changes
from krea_dagster.engine.budget import Caps, Commitment
from krea_dagster.engine.calls import CallLog
from krea_dagster.engine.changes import Change
from krea_dagster.engine.database import Database
from krea_dagster.engine.ledger import Ledger
from krea_dagster.engine.owner import Owner, is_alive
from krea_dagster.engine.record import Record
from krea_dagster.engine.rows import (
    CHARGES,
    JOINED,
    AccountReading,
    Charge,
    charge_of,
    chunks,
    read_records,
    record_of,
)
from krea_dagster.engine.schema import (
    account_readings,
    commitments,
    events,
    owners,
    prices,
    requests,
    stops,
    submissions,
)
from krea_dagster.engine.snapshot import History, Snapshot
from krea_dagster.engine.statements import Statements
from krea_dagster.engine.states import AT_STAKE, Event, State
from krea_dagster.engine.verdicts import VerdictLog
from krea_dagster.errors import BuyingClosed, ConfigError, JournalError
from krea_dagster.models import AccountCredits, ImageRequest

__all__ = [
    "HEARTBEAT_LIMIT_S",
    "NO_CAPS",
    "AccountReading",
    "Charge",
    "History",
    "Journal",
    "Snapshot",
]

NO_CAPS: Final = Caps()

#: An owner of another machine that has not been heard of for this long is dead.
HEARTBEAT_LIMIT_S: Final = 90.0


class Journal:
    """The journal behind a SQLAlchemy URL.

    Raises JournalError wherever the database cannot be read or written: an unreadable journal
    means stop, never that nothing was bought. ``lock_timeout_s`` is how long SQLite waits for
    another process that writes.
    """

    def __init__(self, url: str, *, lock_timeout_s: float = 60.0) -> None:
        self._database = Database(url, lock_timeout_s=lock_timeout_s)
        self._where = self._database.where
        self._sqlite = self._database.sqlite
        self._statements = Statements(self._database.dialect)
        self._read = self._database.read
        self._write = self._database.write

    def __repr__(self) -> str:
        return f"Journal({self._where!r})"

    def close(self) -> None:
        """Close the connections."""
        self._database.close()

    def look_through(self) -> None:
        """Look for damage that SQLite would not notice. Raises JournalError."""
        self._database.look_through()

    def bind(self, origin: str) -> None:
        """Bind the journal to where its images are bought, for good.

        An image is looked up by what was asked for, so a journal must not hold an emulator's
        pictures beside EvoLink's. Raises ConfigError where it is bound to another origin.
        """
        with self._write("bind") as connection:
            bound = connection.execute(select(schema.about.c.origin)).scalar()
            if bound is None:
                connection.execute(update(schema.about).values(origin=origin))
            elif bound != origin:
                raise ConfigError(
                    f"the journal {self._where} holds images from {bound}, and this run would "
                    f"buy from {origin}. Nothing was bought. Use another storage root "
                    "(KREA_STORAGE) or another journal (KREA_JOURNAL_URL)."
                )

    def reading(self) -> AbstractContextManager[Connection]:
        """A connection for one reading transaction, for those who read many columns at once."""
        return self._read("read")

    @property
    def attempts(self) -> AttemptLog:
        """Which pictures were asked for again."""
        return AttemptLog(self._database)

    @property
    def calls(self) -> CallLog:
        """The callbacks that receivers have written down."""
        return CallLog(self._database)

    @property
    def verdicts(self) -> VerdictLog:
        """What people think of the images."""
        return VerdictLog(self._database)

    # -- owners and claims --------------------------------------------------------------------

    def register(self, owner: Owner, at: datetime) -> None:
        """Enter a process that will carry requests."""
        with self._write("register a run in") as connection:
            connection.execute(
                insert(owners).values(
                    owner=owner.owner,
                    run_id=owner.run_id,
                    host=owner.host,
                    pid=owner.pid,
                    pid_started=owner.pid_started,
                    heartbeat_at=at,
                )
            )

    def heartbeat(self, owner: str, at: datetime) -> None:
        """Say that an owner is alive."""
        with self._write("write a heartbeat to") as connection:
            connection.execute(
                update(owners).where(owners.c.owner == owner).values(heartbeat_at=at)
            )

    def let_go(self, keys: Iterable[str], owner: str) -> None:
        """Give up an owner's claims on these requests."""
        with self._write("release claims in") as connection:
            for chunk in chunks(sorted(keys)):
                connection.execute(
                    update(requests)
                    .where(requests.c.request_key.in_(chunk), requests.c.claimed_by == owner)
                    .values(claimed_by=None)
                )

    def release(self, owner: str) -> None:
        """Give up all claims of an owner, and forget it."""
        with self._write("release claims in") as connection:
            connection.execute(
                update(requests).where(requests.c.claimed_by == owner).values(claimed_by=None)
            )
            connection.execute(delete(owners).where(owners.c.owner == owner))

    def claim(self, keys: Iterable[str], owner: str, at: datetime) -> set[str]:
        """Claim requests for an owner; returns the keys that are its own now.

        A request is free where nobody holds it, or where its holder is dead: its process is
        gone, or, from another machine, not heard of for ``HEARTBEAT_LIMIT_S``.
        """
        mine: set[str] = set()
        with self._write("claim requests in") as connection:
            dead = _dead_owners(connection, at) - {owner}
            free = or_(
                requests.c.claimed_by.is_(None),
                requests.c.claimed_by == owner,
                requests.c.claimed_by.in_(dead),
            )
            # Sorted, here and below, so that two runs never wait for each other's row locks.
            for chunk in chunks(sorted(keys)):
                found = connection.execute(
                    update(requests)
                    .where(requests.c.request_key.in_(chunk), free)
                    .values(claimed_by=owner)
                    .returning(requests.c.request_key)
                )
                mine.update(found.scalars())
        return mine

    # -- requests -----------------------------------------------------------------------------

    def plan(self, wanted: Iterable[tuple[ImageRequest, str]], *, run_id: str, at: datetime) -> int:
        """Enter requests that are not known yet, as planned; returns how many were new.

        ``wanted`` are pairs of a request and the partition key of the first row that wants it.
        """
        added = 0
        with self._write("plan requests in") as connection:
            for chunk in chunks(sorted(wanted, key=lambda pair: pair[0].request_key)):
                rows = {
                    request.request_key: {
                        "request_key": request.request_key,
                        "model": request.model,
                        "prompt": request.prompt,
                        "size": request.size,
                        "quality": request.quality,
                        "seed": request.seed,
                        "nsfw_check": request.nsfw_check,
                        "attempt": request.attempt,
                        "partition_key": partition_key,
                        "state": State.PLANNED.value,
                        "seq": 0,
                        "updated_at": at,
                    }
                    for request, partition_key in chunk
                }
                new = connection.execute(
                    self._upsert(requests)
                    .on_conflict_do_nothing()
                    .returning(requests.c.request_key),
                    list(rows.values()),
                )
                first = [
                    {
                        "request_key": key,
                        "seq": 0,
                        "at": at,
                        "run_id": run_id,
                        "from_state": "",
                        "event": Event.PLANNED.value,
                        "to_state": State.PLANNED.value,
                        "idempotency_key": None,
                        "data": None,
                    }
                    for key in new.scalars()
                ]
                if first:
                    connection.execute(insert(events), first)
                added += len(first)
        return added

    def records(self, keys: Iterable[str]) -> dict[str, Record]:
        """The requests with these keys, as they stand; unknown keys are left out."""
        with self._read("read") as connection:
            return read_records(connection, keys)

    def known_tasks(self, task_ids: Iterable[str | None]) -> set[str]:
        """Those of these tasks that a submission has already."""
        wanted = sorted({task_id for task_id in task_ids if task_id is not None})
        found: set[str] = set()
        with self._read("read") as connection:
            for chunk in chunks(wanted):
                rows = connection.execute(
                    select(submissions.c.task_id).where(submissions.c.task_id.in_(chunk))
                )
                found.update(rows.scalars())
        return found

    def all_records(self) -> Iterator[Record]:
        """Every request, in the order of their keys."""
        with self._read("read") as connection:
            for row in connection.execute(JOINED.order_by(requests.c.request_key)):
                yield record_of(row)

    def unsettled(self) -> list[Record]:
        """The requests that are paid for, or may be, and not at hand; the oldest first."""
        states = [state.value for state in AT_STAKE]
        with self._read("read") as connection:
            rows = connection.execute(
                JOINED.where(requests.c.state.in_(states)).order_by(submissions.c.sent_at)
            )
            return [record_of(row) for row in rows]

    def given_up(self) -> list[Record]:
        """The requests that are paid and lost, whose task could be asked about again."""
        with self._read("read") as connection:
            rows = connection.execute(
                JOINED.where(
                    requests.c.state == State.EXPIRED.value, submissions.c.task_id.is_not(None)
                ).order_by(submissions.c.sent_at)
            )
            return [record_of(row) for row in rows]

    def unattended(self, at: datetime) -> list[Record]:
        """The unsettled requests that no living run holds; the oldest first."""
        with self._read("read") as connection:
            dead = _dead_owners(connection, at)
        return [
            record
            for record in self.unsettled()
            if record.claimed_by is None or record.claimed_by in dead
        ]

    def count_by_state(self) -> dict[State, int]:
        """How many requests stand in each state; states without one are left out."""
        with self._read("read") as connection:
            rows = connection.execute(
                select(requests.c.state, func.count()).group_by(requests.c.state)
            )
            return {State(state): count for state, count in rows}

    def history(self, request_key: str) -> list[tuple[datetime, Event, Mapping[str, Any]]]:
        """All events of one request in their order: when, what, and what was kept with it."""
        with self._read("read") as connection:
            rows = connection.execute(
                select(events.c.at, events.c.event, events.c.data)
                .where(events.c.request_key == request_key)
                .order_by(events.c.seq)
            )
            return [(at, Event(name), data or {}) for at, name, data in rows]

    def append(
        self,
        changes: Sequence[Change],
        *,
        owner: str,
        run_id: str,
        caps: Caps = NO_CAPS,
        launch: str = "",
        known: Mapping[str, Record] = MappingProxyType({}),
    ) -> list[Record | JournalError | BuyingClosed]:
        """Write the events of several requests in one commit.

        Answers in the order of the changes: the record as it stands now, or the reason why
        that one change was not written: IllegalTransition, TakenOver where another run holds
        the request, or BuyingClosed where ``caps`` leave no room for a purchase or the account
        has stopped the ``launch`` (the run's own id, unless several runs were launched
        together). The others are written all the same. Raises JournalError where nothing could
        be written.

        ``known`` are records, by request key, as the caller has them from its last change: they
        need not be read again. One that is out of date after all is read, and nothing is lost.
        """

        def write(known: Mapping[str, Record]) -> list[Record | JournalError | BuyingClosed]:
            with self._database.write_by_driver("write to") as cursor:
                statements, name = self._statements, launch or run_id
                ledger = Ledger(cursor, statements, caps, run_id=run_id, launch=name)
                return write_changes(
                    cursor,
                    statements,
                    ledger,
                    changes,
                    owner=owner,
                    run_id=run_id,
                    known=known,
                )

        try:
            return write(known)
        except OutOfDate:
            return write({})

    # -- money --------------------------------------------------------------------------------

    def charges(self) -> list[Charge]:
        """Every submission that was made, in the order of their first POSTs."""
        with self._read("read") as connection:
            order = (submissions.c.sent_at, submissions.c.idempotency_key)
            return [charge_of(row) for row in connection.execute(CHARGES.order_by(*order))]

    def commitment(self, scope: str) -> Commitment:
        """What a scope (``budget.scopes_of``), such as a day, has committed and spent."""
        with self._read("read") as connection:
            row = connection.execute(
                select(commitments.c.committed_units, commitments.c.spent_units).where(
                    commitments.c.scope == scope
                )
            ).first()
            return Commitment() if row is None else Commitment(*row)

    def highest_prices(self) -> dict[str, int]:
        """The highest price that was seen for each quality, in units."""
        with self._read("read") as connection:
            rows = connection.execute(select(prices.c.quality, prices.c.highest_units))
            return {row.quality: row.highest_units for row in rows}

    def stop(self, launch: str, code: str, message: str, at: datetime) -> None:
        """Tell all shards of a launch that the account has stopped the buying."""
        values = {"launch": launch, "at": at, "error_code": code, "error_message": message}
        with self._write("write a stop to") as connection:
            connection.execute(
                self._upsert(stops)
                .values(values)
                .on_conflict_do_update(index_elements=["launch"], set_=values)
            )

    def add_account_reading(self, run_id: str, said: AccountCredits) -> None:
        """Keep what the account said, to hold the journal against."""
        used = said.token_used_units
        with self._write("write an account reading to") as connection:
            connection.execute(
                insert(account_readings).values(
                    at=said.read_at,
                    run_id=run_id,
                    used_units=said.user_used_units if used is None else used,
                    remaining_units=said.user_remaining_units,
                )
            )

    def account_readings(self) -> list[AccountReading]:
        """What the account said, in its order."""
        with self._read("read") as connection:
            rows = connection.execute(select(account_readings).order_by(account_readings.c.id))
            return [
                AccountReading(row.at, row.run_id, row.used_units, row.remaining_units)
                for row in rows
            ]

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """Yield the journal as it stands now, for reads that belong together.

        What runs write meanwhile is not seen. No error of the caller's own is changed.
        """
        with self._database.snapshot() as connection:
            yield Snapshot(connection, self._database.explained)

    def _upsert(self, table: Table) -> Any:
        return (sqlite.insert if self._sqlite else postgresql.insert)(table)


def _dead_owners(connection: Connection, at: datetime) -> set[str]:
    return {
        row.owner
        for row in connection.execute(select(owners))
        if not is_alive(
            Owner(row.owner, row.run_id, row.host, row.pid, row.pid_started),
            silent_s=(at - row.heartbeat_at) / timedelta(seconds=1),
            limit_s=HEARTBEAT_LIMIT_S,
        )
    }
