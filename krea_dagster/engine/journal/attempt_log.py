"""Attempts: how often another image was asked for of a row's sample, and by which run.

An attempt is part of a request, so that raising one asks for a new purchase. Therefore each is
raised by name, once, in a durable commit, and every time is kept with the run that asked. The
attempts of one prompt table are nothing to another that shares the journal.

A wish is open until a run has ended with it: a run that was killed, and is started again with the
same wish, continues it and asks for nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, and_, func, insert, select, update

from krea_dagster.engine.journal.database import Database
from krea_dagster.engine.journal.schema import attempts, raised_attempts


class AttemptLog:
    """The attempts of one prompt table in a journal's database.

    Its methods block. Raises JournalError wherever the database cannot be read or written.
    """

    def __init__(self, database: Database, table_id: str) -> None:
        self._database = database
        self._table_id = table_id
        self._of_table = attempts.c.table_id == table_id

    def current(self) -> dict[tuple[str, int], int]:
        """Return the attempt of each slot that was asked for again; all others are at 0.

        A slot is a prompt_id and a sample.
        """
        columns = attempts.c.prompt_id, attempts.c.sample, attempts.c.attempt
        with self._database.read("read") as connection:
            rows = connection.execute(select(*columns).where(self._of_table))
            return {(row.prompt_id, row.sample): row.attempt for row in rows}

    def drawn(self) -> frozenset[tuple[str, int]]:
        """Return the slots whose seed is drawn, although the table may fix one."""
        query = select(attempts.c.prompt_id, attempts.c.sample)
        with self._database.read("read") as connection:
            rows = connection.execute(query.where(self._of_table, attempts.c.draws))
            return frozenset((row.prompt_id, row.sample) for row in rows)

    def fingerprint(self) -> tuple[int, int]:
        """Return what changes whenever an attempt is raised."""
        with self._database.read("read") as connection:
            count, total = connection.execute(
                select(func.count(), func.coalesce(func.sum(attempts.c.attempt), 0)).where(
                    self._of_table
                )
            ).one()
        return int(count), int(total)

    def raise_attempts(
        self,
        slots: Iterable[tuple[str, int]],
        *,
        raised_by: str,
        at: datetime,
        settled: Callable[[tuple[str, int], int], bool] = lambda _slot, _attempt: True,
        draw: bool = False,
    ) -> list[tuple[str, int]]:
        """Ask for another image of these slots; returns of which it was asked for.

        Not where a run is executed again with the same wish, nor where the last wish has not come
        to its end: no run has ended with it, or its present attempt is not ``settled``. ``draw``:
        the seed is drawn, also where the table fixes it.
        """

        def write(connection: Connection) -> list[tuple[str, int]]:
            raised = []
            # Sorted, so that two runs never wait for each other's row locks.
            for slot in sorted(set(slots)):
                while True:
                    attempt = self._locked_attempt(connection, slot)
                    if self._is_open(connection, slot, attempt, raised_by):
                        break
                    if not settled(slot, attempt):
                        break
                    if self._raise(connection, slot, attempt, raised_by, at, draw=draw):
                        raised.append(slot)
                        break
                    # Of a slot without a row nothing is locked: another run made it just now.
            return raised

        return self._database.write("raise attempts in", write)

    def open_slots(self) -> frozenset[tuple[str, int]]:
        """Return the slots with a wish that no run has come to its end with."""
        wishes = raised_attempts.c
        query = select(wishes.prompt_id, wishes.sample).where(
            wishes.table_id == self._table_id, wishes.ended_at.is_(None)
        )
        with self._database.read("read") as connection:
            return frozenset((row.prompt_id, row.sample) for row in connection.execute(query))

    def close_slots(self, slots: Iterable[tuple[str, int, int]], *, at: datetime) -> None:
        """Note that a run has come to its end with these (prompt_id, sample, attempt).

        A wish that was made since is another one.
        """

        def write(connection: Connection) -> None:
            for prompt_id, sample, attempt in sorted(set(slots)):
                connection.execute(
                    update(raised_attempts)
                    .where(
                        self._wishes_for((prompt_id, sample)),
                        raised_attempts.c.attempt <= attempt,
                        raised_attempts.c.ended_at.is_(None),
                    )
                    .values(ended_at=at)
                )

        self._database.write("end wishes in", write)

    def replace(
        self, slots: Iterable[tuple[str, int, int]], *, raised_by: str, at: datetime
    ) -> list[tuple[str, int]]:
        """Ask for another image in place of these (prompt_id, sample, attempt); returns of which.

        Only where the attempt is still the one that is named: of two runs that want the same
        image replaced, one asks.
        """
        wanted = sorted(slots)

        def write(connection: Connection) -> list[tuple[str, int]]:
            return [
                (prompt_id, sample)
                for prompt_id, sample, attempt in wanted
                if self._raise(connection, (prompt_id, sample), attempt, raised_by, at)
            ]

        return self._database.write("raise attempts in", write)

    def _raise(
        self,
        connection: Connection,
        slot: tuple[str, int],
        attempt: int,
        raised_by: str,
        at: datetime,
        *,
        draw: bool = False,
    ) -> bool:
        """Raise a slot's attempt where it still is this one, and tell whether it was."""
        name = {"table_id": self._table_id, "prompt_id": slot[0], "sample": slot[1]}
        values: dict[str, Any] = {"attempt": attempt + 1, "at": at, "raised_by": raised_by}
        drawn = {"draws": True} if draw else {}
        statement: Any
        if attempt == 0:
            rows = self._database.insertion(attempts).values(**name, **values, **drawn)
            statement = rows.on_conflict_do_nothing()
        else:
            statement = (
                update(attempts)
                .where(self._is(slot), attempts.c.attempt == attempt)
                .values(**values, **drawn)
            )
        if connection.execute(statement.returning(attempts.c.attempt)).first() is None:
            return False
        connection.execute(insert(raised_attempts).values(**name, **values))
        return True

    def _locked_attempt(self, connection: Connection, slot: tuple[str, int]) -> int:
        """Return a slot's attempt; its row, if it has one, is locked until the commit."""
        found = connection.execute(
            select(attempts.c.attempt).where(self._is(slot)).with_for_update()
        )
        return found.scalar() or 0

    def _is_open(
        self, connection: Connection, slot: tuple[str, int], attempt: int, raised_by: str
    ) -> bool:
        """Whether this run has asked before, or the present wish has not come to its end."""
        mine = raised_attempts.c.raised_by == raised_by
        open_ = and_(raised_attempts.c.attempt == attempt, raised_attempts.c.ended_at.is_(None))
        found = connection.execute(
            select(raised_attempts.c.attempt).where(self._wishes_for(slot), mine | open_)
        )
        return found.first() is not None

    def _is(self, slot: tuple[str, int]) -> Any:
        return and_(self._of_table, attempts.c.prompt_id == slot[0], attempts.c.sample == slot[1])

    def _wishes_for(self, slot: tuple[str, int]) -> Any:
        return and_(
            raised_attempts.c.table_id == self._table_id,
            raised_attempts.c.prompt_id == slot[0],
            raised_attempts.c.sample == slot[1],
        )
