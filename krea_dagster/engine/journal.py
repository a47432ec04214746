"""The journal: what was asked for, what was paid, and everything that happened, in SQL.

SQLite by default, PostgreSQL when several machines share it. Each change checks the present
state, appends an event and updates the current state in one transaction; legality and
uniqueness are constraints of the tables besides. The methods block: ``writer.GroupCommit``
gathers the changes of many requests into one commit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby, islice
from typing import Any, Final, TypeVar

from sqlalchemy import (
    Column,
    Connection,
    Row,
    Select,
    Table,
    bindparam,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from krea_dagster.engine import schema
from krea_dagster.engine.budget import Caps, Commitment
from krea_dagster.engine.changes import (
    Change,
    Present,
    Step,
    check,
    event_row,
    request_values,
    submission_row,
    submission_values,
)
from krea_dagster.engine.database import Database
from krea_dagster.engine.ledger import Ledger
from krea_dagster.engine.owner import Owner, is_alive
from krea_dagster.engine.record import Record, StoredImage
from krea_dagster.engine.schema import (
    account_readings,
    attempts,
    commitments,
    events,
    owners,
    prices,
    requests,
    stops,
    submissions,
)
from krea_dagster.engine.states import AT_STAKE, Event, State
from krea_dagster.errors import BuyingClosed, ConfigError, JournalError
from krea_dagster.models import AccountCredits, ImageRequest

_T = TypeVar("_T")

#: Keys per statement: under every database's limit of parameters.
_CHUNK: Final = 500

NO_CAPS: Final = Caps()

#: An owner of another machine that has not been heard of for this long is dead.
HEARTBEAT_LIMIT_S: Final = 90.0


@dataclass(frozen=True)
class Charge:
    """One submission: a purchase, or what may have been one. Money in units, None if not known.

    ``state`` is the request's, where this submission is its present one, and else None: an
    earlier one ended without an image and, as far as is known, without a charge.
    """

    idempotency_key: str
    request_key: str
    number: int
    run_id: str
    partition_key: str
    quality: str
    sent_at: datetime
    posts: int
    task_id: str | None
    submitted_at: datetime | None
    expected_units: int
    committed_units: int
    reserved_units: int | None
    charged_units: int | None
    settled_at: datetime | None
    state: State | None


@dataclass(frozen=True)
class AccountReading:
    """What ``GET /v1/credits`` said during a run, in units: the key's use, or the account's."""

    at: datetime
    run_id: str
    used_units: int
    remaining_units: int


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
            for chunk in _chunks(sorted(keys)):
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
            for chunk in _chunks(sorted(keys)):
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
            for chunk in _chunks(sorted(wanted, key=lambda pair: pair[0].request_key)):
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
        found: dict[str, Record] = {}
        with self._read("read") as connection:
            for chunk in _chunks(keys):
                found.update(_records(connection, chunk))
        return found

    def all_records(self) -> Iterator[Record]:
        """Every request, in the order of their keys."""
        with self._read("read") as connection:
            for row in connection.execute(_joined().order_by(requests.c.request_key)):
                yield _record(row)

    def unsettled(self) -> list[Record]:
        """The requests that are paid for, or may be, and not at hand; the oldest first."""
        states = [state.value for state in AT_STAKE]
        with self._read("read") as connection:
            rows = connection.execute(
                _joined().where(requests.c.state.in_(states)).order_by(submissions.c.sent_at)
            )
            return [_record(row) for row in rows]

    def given_up(self) -> list[Record]:
        """The requests that are paid and lost, whose task could be asked about again."""
        with self._read("read") as connection:
            rows = connection.execute(
                _joined()
                .where(requests.c.state == State.EXPIRED.value, submissions.c.task_id.is_not(None))
                .order_by(submissions.c.sent_at)
            )
            return [_record(row) for row in rows]

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
    ) -> list[Record | JournalError | BuyingClosed]:
        """Write the events of several requests in one commit.

        Answers in the order of the changes: the record as it stands now, or the reason why
        that one change was not written: IllegalTransition, TakenOver where another run holds
        the request, or BuyingClosed where ``caps`` leave no room for a purchase or the account
        has stopped the ``launch`` (the run's own id, unless several runs were launched
        together). The others are written all the same. Raises JournalError where nothing could
        be written.
        """
        answers: dict[int, Record | JournalError | BuyingClosed] = {}
        written: dict[int, str] = {}
        with self._write("write to") as connection:
            present = {
                key: row
                for chunk in _chunks({change.request_key for change in changes})
                for key, row in _states(connection, chunk, lock=not self._sqlite).items()
            }
            ledger = Ledger(connection, caps, run_id=run_id, launch=launch or run_id)
            steps: list[Step] = []
            for number, change in enumerate(changes):
                try:
                    step = check(change, present.get(change.request_key), owner)
                    buys = change.event is Event.SUBMITTING
                    step = ledger.admit(step) if buys else ledger.settle(step)
                except (JournalError, BuyingClosed) as error:
                    answers[number] = error
                    continue
                present[change.request_key] = step.after
                written[number] = change.request_key
                steps.append(step)
            for round_ in _rounds(steps):
                _write_steps(connection, round_, run_id)
            ledger.write()
            records = {
                key: record
                for chunk in _chunks(set(written.values()))
                for key, record in _records(connection, chunk).items()
            }
        answers.update({number: records[key] for number, key in written.items()})
        return [answers[number] for number in range(len(changes))]

    # -- money --------------------------------------------------------------------------------

    def charges(self) -> list[Charge]:
        """Every submission that was made, in the order of their first POSTs."""
        with self._read("read") as connection:
            order = (submissions.c.sent_at, submissions.c.idempotency_key)
            return [_charge(row) for row in connection.execute(_charges().order_by(*order))]

    def commitment(self, scope: str) -> Commitment:
        """What ``run:<run id>`` or ``day:<YYYY-MM-DD>`` has committed and spent."""
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

    # -- attempts -----------------------------------------------------------------------------

    def attempts(self) -> dict[tuple[str, int], int]:
        """How often a person asked for another picture, by prompt_id and sample."""
        with self._read("read") as connection:
            rows = connection.execute(
                select(attempts.c.prompt_id, attempts.c.sample, attempts.c.attempt)
            )
            return {(row.prompt_id, row.sample): row.attempt for row in rows}

    def raise_attempts(
        self, samples: Iterable[tuple[str, int]], *, raised_by: str, at: datetime
    ) -> int:
        """Ask for another picture of these (prompt_id, sample); returns of how many.

        Once for each ``raised_by``, so that a run that is repeated with the same wish does not
        ask again.
        """
        raised = 0
        with self._write("raise attempts in") as connection:
            for prompt_id, sample in samples:
                found = connection.execute(
                    self._upsert(attempts)
                    .values(
                        prompt_id=prompt_id, sample=sample, attempt=1, at=at, raised_by=raised_by
                    )
                    .on_conflict_do_update(
                        index_elements=["prompt_id", "sample"],
                        set_={"attempt": attempts.c.attempt + 1, "at": at, "raised_by": raised_by},
                        where=attempts.c.raised_by != raised_by,
                    )
                    .returning(attempts.c.attempt)
                )
                raised += len(found.all())
        return raised

    def _upsert(self, table: Table) -> Any:
        return (sqlite.insert if self._sqlite else postgresql.insert)(table)


@dataclass(frozen=True)
class History:
    """A request's state, and the events that led to it: ``(seq, event)`` in their order, as text.

    ``seq`` is the number that the request gives its last event.
    """

    request_key: str
    state: str
    seq: int
    events: Sequence[tuple[int, str]]


class Snapshot:
    """The journal at one moment. Rows stream by, a thousand at a time, in the order of the keys.

    All raise JournalError where they cannot be read.
    """

    def __init__(
        self,
        connection: Connection,
        explained: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._connection = connection.execution_options(yield_per=1000)
        self._explained = explained

    def records(self) -> Iterator[Record]:
        """Every request."""
        for row in self._rows(_joined().order_by(requests.c.request_key)):
            yield _record(row)

    def charges(self) -> Iterator[Charge]:
        """Every submission; those of one request follow one another by their numbers."""
        order = (submissions.c.request_key, submissions.c.number)
        for row in self._rows(_charges().order_by(*order)):
            yield _charge(row)

    def histories(self) -> Iterator[History]:
        """Every request's events."""
        query = (
            select(
                requests.c.request_key,
                requests.c.state,
                requests.c.seq.label("last"),
                events.c.seq,
                events.c.event,
            )
            .select_from(requests.outerjoin(events))
            .order_by(requests.c.request_key, events.c.seq)
        )
        for key, group in groupby(self._rows(query), key=lambda row: str(row.request_key)):
            found = list(group)
            happened = [(row.seq, row.event) for row in found if row.event is not None]
            yield History(key, found[0].state, found[0].last, happened)

    def commitments(self) -> dict[str, Commitment]:
        """What each run and day has committed and spent, by scope."""
        return {
            row.scope: Commitment(row.committed_units, row.spent_units)
            for row in self._rows(select(commitments))
        }

    def account_readings(self) -> list[AccountReading]:
        """What the account said, in its order."""
        query = select(account_readings).order_by(account_readings.c.id)
        return [
            AccountReading(row.at, row.run_id, row.used_units, row.remaining_units)
            for row in self._rows(query)
        ]

    def _rows(self, query: Select[Any]) -> Iterator[Row[Any]]:
        with self._explained("read"):
            yield from self._connection.execute(query)


# -- rows -----------------------------------------------------------------------------------------


def _rounds(steps: Iterable[Step]) -> list[list[Step]]:
    """The steps in rounds that hold each request once: within a round the order is free."""
    rounds: list[list[Step]] = []
    taken: Counter[str] = Counter()
    for step in steps:
        number = taken[step.change.request_key]
        taken[step.change.request_key] += 1
        if number == len(rounds):
            rounds.append([])
        rounds[number].append(step)
    return rounds


def _write_steps(connection: Connection, steps: Sequence[Step], run_id: str) -> None:
    """Write three kinds of rows; statements of one shape go to the driver together."""
    new: list[dict[str, Any]] = []
    log: list[dict[str, Any]] = []
    request_updates: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    submission_updates: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for step in steps:
        change = step.change
        log.append(event_row(step, run_id))
        values = request_values(step)
        request_updates.setdefault(tuple(values), []).append(
            {"b_key": change.request_key, **{f"b_{name}": item for name, item in values.items()}}
        )
        if step.opens_submission:
            new.append(submission_row(step, run_id))
            continue
        values = submission_values(step, run_id)
        if values:
            submission_updates.setdefault(tuple(values), []).append(
                {
                    "b_key": step.after.idempotency_key or step.before.idempotency_key,
                    **{f"b_{name}": item for name, item in values.items()},
                }
            )
    if new:
        connection.execute(insert(submissions), new)
    for names, rows in submission_updates.items():
        _update_each(connection, submissions, submissions.c.idempotency_key, names, rows)
    for names, rows in request_updates.items():
        _update_each(connection, requests, requests.c.request_key, names, rows)
    if log:
        connection.execute(insert(events), log)


def _update_each(
    connection: Connection,
    table: Table,
    key: Column[str],
    names: tuple[str, ...],
    rows: list[dict[str, Any]],
) -> None:
    assignments: dict[str, Any] = {name: bindparam(f"b_{name}") for name in names}
    if "posts" in assignments:
        assignments["posts"] = submissions.c.posts + bindparam("b_posts")
    connection.execute(update(table).where(key == bindparam("b_key")).values(assignments), rows)


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


def _states(connection: Connection, keys: Sequence[str], *, lock: bool) -> dict[str, Present]:
    earlier = submissions.alias("earlier")
    query = select(
        requests.c.request_key,
        requests.c.state,
        requests.c.seq,
        requests.c.claimed_by,
        requests.c.idempotency_key,
        select(func.coalesce(func.max(earlier.c.number), 0))
        .where(earlier.c.request_key == requests.c.request_key)
        .scalar_subquery()
        .label("last_submission"),
        requests.c.quality,
        submissions.c.committed_units,
        submissions.c.expected_units,
        submissions.c.run_id,
        submissions.c.sent_at,
    )
    query = query.select_from(_WITH_SUBMISSION).where(requests.c.request_key.in_(keys))
    if lock:
        query = query.with_for_update(of=requests)
    return {
        row.request_key: Present(
            state=State(row.state),
            seq=row.seq,
            claimed_by=row.claimed_by,
            idempotency_key=row.idempotency_key,
            last_submission=row.last_submission,
            quality=row.quality,
            committed_units=row.committed_units or 0,
            expected_units=row.expected_units or 0,
            bought_by=row.run_id or "",
            sent_at=row.sent_at,
        )
        for row in connection.execute(query)
    }


#: Requests, each beside its present submission where it has one.
_WITH_SUBMISSION: Final = requests.outerjoin(
    submissions, requests.c.idempotency_key == submissions.c.idempotency_key
)


def _joined() -> Select[Any]:
    return select(requests, *(submissions.c[name] for name in _SUBMISSION)).select_from(
        requests.outerjoin(submissions, requests.c.idempotency_key == submissions.c.idempotency_key)
    )


#: Columns of the present submission that a record shows.
_SUBMISSION: Final = (
    "number",
    "run_id",
    "sent_at",
    "submitted_at",
    "task_id",
    "reserved_units",
    "charged_units",
    "committed_units",
    "billing_rule",
    "user_group",
)


def _records(connection: Connection, keys: Sequence[str]) -> dict[str, Record]:
    rows = connection.execute(_joined().where(requests.c.request_key.in_(keys)))
    return {row.request_key: _record(row) for row in rows}


def _record(row: Row[Any]) -> Record:
    image = None
    if row.image_path is not None:
        image = StoredImage(
            path=row.image_path,
            sha256=row.image_sha256,
            bytes=row.image_bytes,
            format=row.image_format,
            width=row.width,
            height=row.height,
        )
    return Record(
        request=ImageRequest(
            request_key=row.request_key,
            prompt=row.prompt,
            size=row.size,
            quality=row.quality,
            seed=row.seed,
            nsfw_check=row.nsfw_check,
            attempt=row.attempt,
            model=row.model,
        ),
        state=State(row.state),
        partition_key=row.partition_key,
        submission=row.number or 0,
        idempotency_key=row.idempotency_key,
        sent_at=row.sent_at,
        submitted_at=row.submitted_at,
        task_id=row.task_id,
        reserved_units=row.reserved_units,
        charged_units=row.charged_units,
        committed_units=row.committed_units or 0,
        billing_rule=row.billing_rule,
        user_group=row.user_group,
        run_id=row.run_id,
        result_url=row.result_url,
        completed_at=row.completed_at,
        stored_at=row.stored_at,
        image=image,
        error_code=row.error_code,
        error_message=row.error_message,
        claimed_by=row.claimed_by,
    )


def _charges() -> Select[Any]:
    return select(
        submissions,
        requests.c.quality,
        requests.c.state,
        requests.c.idempotency_key.label("present_key"),
    ).join(requests, submissions.c.request_key == requests.c.request_key)


def _charge(row: Row[Any]) -> Charge:
    present = row.idempotency_key == row.present_key
    return Charge(
        idempotency_key=row.idempotency_key,
        request_key=row.request_key,
        number=row.number,
        run_id=row.run_id,
        partition_key=row.partition_key,
        quality=row.quality,
        sent_at=row.sent_at,
        posts=row.posts,
        task_id=row.task_id,
        submitted_at=row.submitted_at,
        expected_units=row.expected_units,
        committed_units=row.committed_units,
        reserved_units=row.reserved_units,
        charged_units=row.charged_units,
        settled_at=row.settled_at,
        state=State(row.state) if present else None,
    )


def _chunks(items: Iterable[_T]) -> Iterator[list[_T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk
