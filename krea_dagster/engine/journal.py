"""The journal: what was asked for, what was paid, and everything that happened, in SQL.

SQLite by default, PostgreSQL when several machines share it. Each change checks the present
state, appends an event and updates the current state in one transaction; legality and
uniqueness are constraints of the tables besides. The methods block: ``writer.GroupCommit``
gathers the changes of many requests into one commit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeVar

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Row,
    Select,
    Table,
    bindparam,
    create_engine,
    delete,
    event,
    func,
    insert,
    inspect,
    make_url,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from krea_dagster.engine import schema
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
from krea_dagster.engine.owner import Owner, is_alive
from krea_dagster.engine.record import Record, StoredImage
from krea_dagster.engine.schema import events, owners, requests, submissions, transitions
from krea_dagster.engine.states import TRANSITIONS, Event, State
from krea_dagster.errors import ConfigError, JournalError
from krea_dagster.models import ImageRequest

_T = TypeVar("_T")

#: Keys per statement: under every database's limit of parameters.
_CHUNK: Final = 500

#: An owner of another machine that has not been heard of for this long is dead.
HEARTBEAT_LIMIT_S: Final = 90.0


class Journal:
    """The journal behind a SQLAlchemy URL.

    Raises JournalError wherever the database cannot be read or written: an unreadable journal
    means stop, never that nothing was bought.
    """

    def __init__(self, url: str) -> None:
        try:
            parsed = make_url(url)
        except SQLAlchemyError as error:
            raise ConfigError(
                "the journal's URL cannot be read; expected something like "
                "sqlite:////data/journal.db or postgresql+psycopg://user@host/database"
            ) from error
        self._where = parsed.render_as_string(hide_password=True)
        self._sqlite = parsed.get_backend_name() == "sqlite"
        if self._sqlite and parsed.database not in (None, "", ":memory:"):
            Path(str(parsed.database)).parent.mkdir(parents=True, exist_ok=True)
        with self._explained("open"):
            self._reading = self._engine(url, begin="BEGIN")
            self._writing = self._engine(url, begin="BEGIN IMMEDIATE")
            self._create()

    def __repr__(self) -> str:
        return f"Journal({self._where!r})"

    def close(self) -> None:
        """Close the connections."""
        self._reading.dispose()
        self._writing.dispose()

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
            dead = [
                row.owner
                for row in connection.execute(select(owners))
                if row.owner != owner
                and not is_alive(
                    Owner(row.owner, row.run_id, row.host, row.pid, row.pid_started),
                    silent_s=(at - row.heartbeat_at) / timedelta(seconds=1),
                    limit_s=HEARTBEAT_LIMIT_S,
                )
            ]
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
        upsert = sqlite.insert if self._sqlite else postgresql.insert
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
                    upsert(requests).on_conflict_do_nothing().returning(requests.c.request_key),
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
        self, changes: Sequence[Change], *, owner: str, run_id: str
    ) -> list[Record | JournalError]:
        """Write the events of several requests in one commit.

        Answers in the order of the changes: the record as it stands now, or the reason why
        that one change was not written: IllegalTransition, or a JournalError where another
        run has taken the request over. The others are written all the same. Raises
        JournalError where nothing could be written.
        """
        answers: dict[int, Record | JournalError] = {}
        written: dict[int, str] = {}
        with self._write("write to") as connection:
            present = {
                key: row
                for chunk in _chunks({change.request_key for change in changes})
                for key, row in _states(connection, chunk, lock=not self._sqlite).items()
            }
            steps: list[Step] = []
            for number, change in enumerate(changes):
                try:
                    step = check(change, present.get(change.request_key), owner)
                except JournalError as error:
                    answers[number] = error
                    continue
                present[change.request_key] = step.after
                written[number] = change.request_key
                steps.append(step)
            for round_ in _rounds(steps):
                _write_steps(connection, round_, run_id)
            records = {
                key: record
                for chunk in _chunks(set(written.values()))
                for key, record in _records(connection, chunk).items()
            }
        answers.update({number: records[key] for number, key in written.items()})
        return [answers[number] for number in range(len(changes))]

    # -- connections --------------------------------------------------------------------------

    def _engine(self, url: str, *, begin: str) -> Engine:
        if not self._sqlite:
            return create_engine(url, pool_size=2, pool_pre_ping=True)
        # One connection per use: SQLite's are cheap, and none is held across a fork.
        engine = create_engine(url, poolclass=NullPool, connect_args={"timeout": 60.0})

        @event.listens_for(engine, "connect")
        def _configure(connection: Any, _record: Any) -> None:
            # Transactions are begun by hand, because the driver would begin them too late to
            # read and write under one lock.
            connection.isolation_level = None
            cursor = connection.cursor()
            cursor.execute("PRAGMA journal_mode = WAL")
            cursor.execute("PRAGMA synchronous = FULL")
            cursor.execute("PRAGMA foreign_keys = ON")
            cursor.close()

        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            connection.exec_driver_sql(begin)

        return engine

    def _create(self) -> None:
        with self._writing.begin() as connection:
            if inspect(connection).has_table(schema.about.name):
                version = connection.execute(select(schema.about.c.version)).scalar()
                if version != schema.SCHEMA_VERSION:
                    raise JournalError(
                        f"{self._where} has schema version {version}, and this version of "
                        f"krea-dagster reads {schema.SCHEMA_VERSION}. Nothing was changed or "
                        "bought. Use the version that wrote it."
                    )
                return
            schema.metadata.create_all(connection)
            connection.execute(insert(schema.about).values(version=schema.SCHEMA_VERSION))
            connection.execute(
                insert(transitions),
                [
                    {
                        "from_state": "" if before is None else before.value,
                        "event": happened.value,
                        "to_state": after.value,
                    }
                    for (before, happened), after in TRANSITIONS.items()
                ],
            )

    @contextmanager
    def _read(self, doing: str) -> Iterator[Connection]:
        with self._explained(doing), self._reading.connect() as connection:
            yield connection

    @contextmanager
    def _write(self, doing: str) -> Iterator[Connection]:
        with self._explained(doing), self._writing.begin() as connection:
            yield connection

    @contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            # The statement and its parameters hold prompts, so only the driver's words are shown.
            raise JournalError(
                f"could not {doing} the journal {self._where}: {error.orig}. Nothing more is "
                "bought until it can be written. What was paid for is safe: run again when it is "
                "mended."
            ) from error.orig


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


def _states(connection: Connection, keys: Sequence[str], *, lock: bool) -> dict[str, Present]:
    query = select(
        requests.c.request_key,
        requests.c.state,
        requests.c.seq,
        requests.c.claimed_by,
        requests.c.idempotency_key,
        select(func.coalesce(func.max(submissions.c.number), 0))
        .where(submissions.c.request_key == requests.c.request_key)
        .scalar_subquery(),
    ).where(requests.c.request_key.in_(keys))
    if lock:
        query = query.with_for_update(of=requests)
    return {
        key: Present(State(state), seq, claimed_by, idempotency, number)
        for key, state, seq, claimed_by, idempotency, number in connection.execute(query)
    }


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


def _chunks(items: Iterable[_T]) -> Iterator[list[_T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk
