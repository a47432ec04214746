"""The journal: what was asked for, what was paid, and everything that happened, in SQL.

SQLite by default, PostgreSQL when several machines share it. Each change checks the present
state, appends an event and updates the current state in one transaction; legality and
uniqueness are constraints of the tables besides. The methods block: ``writer.GroupCommit``
gathers the changes of many requests into one commit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from functools import partial
from types import MappingProxyType
from typing import Any, Final

from sqlalchemy import (
    Connection,
    and_,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    update,
)

from krea_dagster.engine.budget import Caps, Commitment, scopes_of
from krea_dagster.engine.journal import schema
from krea_dagster.engine.journal.api_key_log import ApiKeyLog
from krea_dagster.engine.journal.append import StaleRecord, write_changes
from krea_dagster.engine.journal.attempt_log import AttemptLog
from krea_dagster.engine.journal.callback_log import CallbackLog
from krea_dagster.engine.journal.changes import Change
from krea_dagster.engine.journal.commitments import CommitmentLedger
from krea_dagster.engine.journal.database import Database
from krea_dagster.engine.journal.owners import Owner
from krea_dagster.engine.journal.pace_log import PaceLog
from krea_dagster.engine.journal.prompt_table_log import PromptTableLog
from krea_dagster.engine.journal.root_log import RootLog
from krea_dagster.engine.journal.rows import (
    CHARGES,
    JOINED,
    AccountReading,
    Charge,
    charge_from_row,
    chunks,
    read_records,
    record_from_row,
)
from krea_dagster.engine.journal.schema import (
    UtcTime,
    account_readings,
    commitments,
    events,
    owners,
    prices,
    requests,
    stops,
    submissions,
)
from krea_dagster.engine.journal.snapshot import RequestEvents, Snapshot
from krea_dagster.engine.journal.statements import insertion
from krea_dagster.engine.journal.verdict_log import VerdictLog
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import AT_STAKE, Event, State
from krea_dagster.errors import BuyingClosed, ConfigError, JournalError
from krea_dagster.models import AccountCredits, ImageRequest

__all__ = [
    "NO_CAPS",
    "AccountReading",
    "Charge",
    "Journal",
    "RequestEvents",
    "Snapshot",
]

NO_CAPS: Final = Caps()


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
        self._read = self._database.read
        self._write = self._database.write
        self._locks = self._database.locks

    def __repr__(self) -> str:
        return f"Journal({self._where!r})"

    def close(self) -> None:
        """Close the connections."""
        self._database.close()

    def ping(self) -> None:
        """See that the database answers. Raises JournalUnavailable where it does not."""
        self._database.ping()

    def check_integrity(self) -> None:
        """Look for damage that SQLite would not notice. Raises JournalError."""
        self._database.check_integrity()

    def bind(self, origin: str) -> None:
        """Bind the journal to where its images are bought, for good.

        An image is looked up by what was asked for, so a journal must not hold an emulator's
        images beside EvoLink's. Raises ConfigError where it is bound to another origin.
        """
        about = schema.about

        def write(connection: Connection) -> str | None:
            connection.execute(update(about).where(about.c.origin.is_(None)).values(origin=origin))
            return connection.execute(select(about.c.origin)).scalar()

        bound = self._write("bind", write)
        if bound != origin:
            raise ConfigError(
                f"the journal {self._where} holds images from {bound}, and this run would "
                f"buy from {origin}. Nothing was bought. Use another storage root "
                "(KREA_STORAGE) or another journal (KREA_JOURNAL_URL)."
            )

    def reading(self) -> AbstractContextManager[Connection]:
        """A connection for one reading transaction, for those who read many columns at once."""
        return self._read("read")

    def attempts(self, table_id: str) -> AttemptLog:
        """Which images of a prompt table were asked for again."""
        return AttemptLog(self._database, table_id)

    @property
    def roots(self) -> RootLog:
        """The storage roots that hold the images."""
        return RootLog(self._database)

    @property
    def tables(self) -> PromptTableLog:
        """The prompt tables whose runs share the journal."""
        return PromptTableLog(self._database)

    @property
    def api_keys(self) -> ApiKeyLog:
        """The API keys that images were bought with."""
        return ApiKeyLog(self._database)

    @property
    def paces(self) -> PaceLog:
        """What its runs have learned of their accounts' limits."""
        return PaceLog(self._database)

    @property
    def journal_id(self) -> str:
        """The random name that tells this journal from every other."""
        return self._database.journal_id

    @property
    def begun(self) -> bool:
        """Whether this object has made the journal, where none was."""
        return self._database.begun

    @property
    def callbacks(self) -> CallbackLog:
        """The callbacks that receivers have written down."""
        return CallbackLog(self._database)

    @property
    def verdicts(self) -> VerdictLog:
        """What people think of the images."""
        return VerdictLog(self._database)

    # -- owners and claims --------------------------------------------------------------------

    def register(self, owner: Owner) -> None:
        """Enter a run that will carry requests, and take its lock."""
        with self._database.explained("lock"):
            self._locks.take(owner.owner)
        now = self._locks.now()

        def write(connection: Connection) -> None:
            row = insertion(connection, owners).values(
                owner=owner.owner,
                run_id=owner.run_id,
                host=owner.host,
                pid=owner.pid,
                since=now,
                heartbeat_at=now,
            )
            # It may have been entered before a connection broke.
            connection.execute(row.on_conflict_do_nothing())

        self._write("register a run in", write)

    def heartbeat(self, owner: str) -> None:
        """Say that a run is alive."""
        with self._database.explained("lock"):
            self._locks.take(owner)
        beat = update(owners).where(owners.c.owner == owner).values(heartbeat_at=self._locks.now())
        self._write("write a heartbeat to", lambda connection: connection.execute(beat))

    def unclaim(self, keys: Iterable[str], owner: str) -> None:
        """Give up an owner's claims on these requests."""
        wanted = sorted(keys)

        def write(connection: Connection) -> None:
            for chunk in chunks(wanted):
                mine = requests.c.request_key.in_(chunk), requests.c.claimed_by == owner
                self._lock_rows(connection, *mine)
                connection.execute(update(requests).where(*mine).values(claimed_by=None))

        self._write("release claims in", write)

    def release(self, owner: str) -> None:
        """Give up all claims of an owner and its lock, and forget it.

        The lock is given back also where the journal cannot be written.
        """
        mine = requests.c.claimed_by == owner

        def write(connection: Connection) -> None:
            self._lock_rows(connection, mine)
            connection.execute(update(requests).where(mine).values(claimed_by=None))
            connection.execute(delete(owners).where(owners.c.owner == owner))

        try:
            self._write("release claims in", write)
            self._locks.forget(owner)
        finally:
            self._locks.give_back(owner)

    def claim(self, keys: Iterable[str], owner: str) -> set[str]:
        """Claim requests for an owner; returns the keys that are its own now.

        A request is free where nobody holds it, or where its holder is dead (``owner.py``).
        """
        wanted = sorted(keys)

        def write(connection: Connection) -> tuple[set[str], set[str]]:
            mine: set[str] = set()
            dead = self._locks.dead(connection) - {owner}
            free = or_(
                requests.c.claimed_by.is_(None),
                requests.c.claimed_by == owner,
                requests.c.claimed_by.in_(dead),
            )
            for chunk in chunks(wanted):
                chosen = requests.c.request_key.in_(chunk), free
                self._lock_rows(connection, *chosen)
                found = connection.execute(
                    update(requests)
                    .where(*chosen)
                    .values(claimed_by=owner)
                    .returning(requests.c.request_key)
                )
                mine.update(found.scalars())
            return mine, self._forget_idle(connection, dead)

        mine, forgotten = self._write("claim requests in", write)
        for gone in forgotten:
            self._locks.forget(gone)
        return mine

    def _forget_idle(self, connection: Connection, dead: set[str]) -> set[str]:
        """Remove the dead owners that hold nothing any more; the others stay, to be found dead."""
        if not dead:
            return set()
        held = select(requests.c.claimed_by).where(requests.c.claimed_by.is_not(None))
        removed = connection.execute(
            delete(owners)
            .where(owners.c.owner.in_(dead), owners.c.owner.not_in(held))
            .returning(owners.c.owner)
        )
        return set(removed.scalars())

    def holders(self, keys: Iterable[str]) -> dict[str, str]:
        """Who holds these requests, in words for people, by request key."""
        found: dict[str, str] = {}
        with self._read("read") as connection:
            for chunk in chunks(sorted(keys)):
                rows = connection.execute(
                    select(requests.c.request_key, owners)
                    .join(owners, requests.c.claimed_by == owners.c.owner)
                    .where(requests.c.request_key.in_(chunk))
                )
                for row in rows:
                    found[row.request_key] = (
                        f"run {row.run_id} (process {row.pid} on {row.host}, since "
                        f"{row.since:%Y-%m-%d %H:%M:%S} UTC)"
                    )
        return found

    def _lock_rows(self, connection: Connection, *conditions: Any) -> None:
        """Lock requests in the order of their keys, so that no two transactions deadlock.

        An UPDATE locks them in the order in which it finds them. SQLite locks the whole file.
        """
        if not self._sqlite:
            connection.execute(
                select(requests.c.request_key)
                .where(*conditions)
                .order_by(requests.c.request_key)
                .with_for_update(key_share=True)
            )

    # -- requests -----------------------------------------------------------------------------

    def plan(
        self,
        wanted: Iterable[tuple[ImageRequest, str]],
        *,
        run_id: str,
        at: datetime,
        table_id: str = "",
    ) -> int:
        """Enter requests that are not known yet, as planned; returns how many were new.

        ``wanted`` are pairs of a request and the partition key of the first row that wants it, in
        the prompt table ``table_id``.
        """
        ordered = sorted(wanted, key=lambda pair: pair[0].request_key)

        def write(connection: Connection) -> int:
            added = 0
            for chunk in chunks(ordered):
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
                        "table_id": table_id,
                        "partition_key": partition_key,
                        "state": State.PLANNED.value,
                        "seq": 0,
                        "updated_at": at,
                    }
                    for request, partition_key in chunk
                }
                new = connection.execute(
                    insertion(connection, requests)
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

        return self._write("plan requests in", write)

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
        """Note of requests that were not bought why they are kept back, where that is news.

        By two statements for many of them. What another run holds is left alone.
        """

        def write(connection: Connection) -> None:
            for chunk in chunks(sorted(keys)):
                news = (
                    requests.c.request_key.in_(chunk),
                    or_(requests.c.claimed_by.is_(None), requests.c.claimed_by == owner),
                    or_(
                        requests.c.state == State.PLANNED.value,
                        and_(
                            requests.c.state == State.DEFERRED.value,
                            func.coalesce(requests.c.error_code, "") != code,
                        ),
                    ),
                )
                self._lock_rows(connection, *news)
                happened = {
                    "request_key": requests.c.request_key,
                    "seq": requests.c.seq + 1,
                    "at": literal(at, UtcTime),
                    "run_id": literal(run_id),
                    "from_state": requests.c.state,
                    "event": literal(Event.DEFERRED.value),
                    "to_state": literal(State.DEFERRED.value),
                }
                rows = select(*happened.values()).where(*news)
                connection.execute(insert(events).from_select(list(happened), rows))
                connection.execute(
                    update(requests)
                    .where(*news)
                    .values(
                        state=State.DEFERRED.value,
                        seq=requests.c.seq + 1,
                        updated_at=at,
                        error_code=code,
                        error_message=message,
                    )
                )

        self._write("defer requests in", write)

    def records(self, keys: Iterable[str]) -> dict[str, Record]:
        """The requests with these keys, as they stand; unknown keys are left out."""
        with self._read("read") as connection:
            return read_records(connection, keys)

    def known_task_ids(self, task_ids: Iterable[str | None]) -> set[str]:
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
                yield record_from_row(row)

    def unsettled(self) -> list[Record]:
        """The requests that are paid for, or may be, and not at hand; the oldest first."""
        states = [state.value for state in AT_STAKE]
        with self._read("read") as connection:
            rows = connection.execute(
                JOINED.where(requests.c.state.in_(states)).order_by(submissions.c.sent_at)
            )
            return [record_from_row(row) for row in rows]

    def expired_since(self, since: datetime) -> list[Record]:
        """The requests that are paid and lost, whose task could be asked about again.

        Of those that were sent since then; the oldest first.
        """
        with self._read("read") as connection:
            rows = connection.execute(
                JOINED.where(
                    requests.c.state == State.EXPIRED.value,
                    submissions.c.task_id.is_not(None),
                    submissions.c.sent_at >= since,
                ).order_by(submissions.c.sent_at)
            )
            return [record_from_row(row) for row in rows]

    def unattended(self) -> list[Record]:
        """The unsettled requests that no living run holds; the oldest first."""
        with self._read("read") as connection:
            dead = self._locks.dead(connection)
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
        root_id: str = "",
        known: Mapping[str, Record] = MappingProxyType({}),
        repeated: bool = False,
    ) -> list[Record | JournalError | BuyingClosed]:
        """Write the events of several requests in one commit.

        Answers in the order of the changes: the record as it stands now, or the reason why
        that one change was not written: IllegalTransition, TakenOver where another run holds
        the request, or BuyingClosed where ``caps`` leave no room for a purchase or the account
        has stopped the ``launch`` (the run's own id, unless several runs were launched
        together), or TaskTaken where another purchase has the task that the server named. The
        others are written all the same. ``root_id`` is the storage root that the changes of files
        are about. Raises JournalError where nothing could be written.

        ``known`` are records, by request key, as the caller has them from its last change: they
        need not be read again. One that is out of date after all is read, and nothing is lost.
        ``repeated``: the same changes were given before, and the connection broke: they may have
        been written.
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
            return self._write("write to", partial(write, {} if repeated else known))
        except StaleRecord:
            return self._write("write to", partial(write, {}))

    # -- money --------------------------------------------------------------------------------

    def charges(self) -> list[Charge]:
        """Every submission that was made, in the order of their first POSTs."""
        with self._read("read") as connection:
            order = (submissions.c.sent_at, submissions.c.idempotency_key)
            return [charge_from_row(row) for row in connection.execute(CHARGES.order_by(*order))]

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

    def accept_price(self, quality: str, at: datetime) -> tuple[int, int]:
        """Believe the price of a quality that was doubted; returns it, in units.

        And how many purchases at that price are settled by it. Raises ConfigError where no price
        is doubted.
        """

        def write(connection: Connection) -> tuple[int, int]:
            units = connection.execute(
                select(prices.c.doubted_units).where(prices.c.quality == quality).with_for_update()
            ).scalar()
            if units is None:
                raise ConfigError(
                    f"no price of {quality} waits to be accepted in the journal {self._where}"
                )
            connection.execute(
                update(prices)
                .where(prices.c.quality == quality)
                .values(
                    highest_units=units, latest_units=units, doubted_units=None, doubted_in_row=0
                )
            )
            waiting = CHARGES.where(
                requests.c.quality == quality,
                submissions.c.reserved_units == units,
                submissions.c.charged_units.is_(None),
                submissions.c.replayed.is_(False),
            )
            charges = [charge_from_row(row) for row in connection.execute(waiting)]
            self._refuse_held(connection, [charge.request_key for charge in charges])
            ended = (State.COMPLETED, State.STORED, State.EXPIRED)
            settled = [charge for charge in charges if charge.state in ended]
            moved: Counter[str] = Counter()
            spent: Counter[str] = Counter()
            for charge in charges:
                values: dict[str, Any] = {"committed_units": units, "expected_units": units}
                if charge.state in ended:
                    values |= {"charged_units": units, "settled_at": at}
                connection.execute(
                    update(submissions)
                    .where(submissions.c.idempotency_key == charge.idempotency_key)
                    .values(values)
                )
                for scope in scopes_of_charge(charge):
                    moved[scope] += units - charge.committed_units
                    spent[scope] += units if charge.state in ended else 0
            for scope in sorted(moved):
                row = commitments.c.scope == scope
                connection.execute(
                    update(commitments)
                    .where(row)
                    .values(
                        committed_units=commitments.c.committed_units + moved[scope],
                        spent_units=commitments.c.spent_units + spent[scope],
                    )
                )
            return units, len(settled)

        return self._write("accept a price in", write)

    def dismiss_price(self, quality: str) -> None:
        """Take the price of a quality that was doubted for a mistake."""
        forgotten = (
            update(prices)
            .where(prices.c.quality == quality)
            .values(doubted_units=None, doubted_in_row=0)
        )
        self._write("dismiss a price in", lambda connection: connection.execute(forgotten))

    def _refuse_held(self, connection: Connection, keys: Sequence[str]) -> None:
        """Refuse to change purchases that a run is at work with. Raises ConfigError."""
        dead = self._locks.dead(connection)
        for chunk in chunks(keys):
            held = connection.execute(
                select(requests.c.claimed_by).where(
                    requests.c.request_key.in_(chunk), requests.c.claimed_by.is_not(None)
                )
            )
            if set(held.scalars()) - dead:
                raise ConfigError(
                    "a run is at work with purchases at that price. Nothing was changed. Wait for "
                    "its end"
                )

    def stop(self, launch: str, code: str, message: str, at: datetime) -> None:
        """Tell all shards of a launch that the account has stopped the buying.

        On PostgreSQL at the time of its clock, whatever ``at`` says.
        """
        at = at if self._sqlite else self._locks.now()
        values = {"launch": launch, "at": at, "error_code": code, "error_message": message}

        def write(connection: Connection) -> None:
            statement = insertion(connection, stops).values(values)
            connection.execute(
                statement.on_conflict_do_update(index_elements=["launch"], set_=values)
            )

        self._write("write a stop to", write)

    def add_account_reading(self, run_id: str, said: AccountCredits) -> None:
        """Keep what the account said, to hold the journal against."""
        used = said.token_used_units
        statement = insert(account_readings).values(
            at=said.read_at,
            run_id=run_id,
            used_units=said.user_used_units if used is None else used,
            remaining_units=said.user_remaining_units,
        )
        self._write("write an account reading to", lambda connection: connection.execute(statement))

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


def scopes_of_charge(charge: Charge) -> tuple[str, ...]:
    """All that a purchase counts for."""
    return scopes_of(
        charge.run_id,
        charge.sent_at,
        charge.partition_key,
        charge.scopes,
        table_id=charge.table_id,
    )
