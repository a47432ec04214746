"""Attempts: how often another image was requested for a row's sample, and by which run.

An attempt is part of a request, so raising it means a new purchase. Each is therefore raised by
name, once, in a durable commit, and recorded with the run that raised it. Prompt tables that share
a journal have separate attempts.

A raised attempt is open until a run has ended with it. A run that was killed, and is started again
in the same way, continues the open attempt and raises nothing.

A slot is a prompt_id and a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, and_, func, insert, select, update

from krea_dagster.engine.journal.database import Database, DatabaseLog
from krea_dagster.engine.journal.schema import attempts, raised_attempts
from krea_dagster.engine.journal.sql import insertion


class AttemptLog(DatabaseLog):
    """The attempts of one prompt table in a journal's database."""

    def __init__(self, database: Database, table_id: str) -> None:
        super().__init__(database)
        self._table_id = table_id
        self._of_table = attempts.c.table_id == table_id

    def current(self) -> dict[tuple[str, int], int]:
        """Return the attempt of each slot that has one; all others are at 0."""
        columns = attempts.c.prompt_id, attempts.c.sample, attempts.c.attempt
        rows = self._database.fetch(select(*columns).where(self._of_table))
        return {(row.prompt_id, row.sample): row.attempt for row in rows}

    def drawn(self) -> frozenset[tuple[str, int]]:
        """Return the slots whose seed is drawn, although the table may fix one."""
        query = select(attempts.c.prompt_id, attempts.c.sample)
        rows = self._database.fetch(query.where(self._of_table, attempts.c.draws))
        return frozenset((row.prompt_id, row.sample) for row in rows)

    def fingerprint(self) -> tuple[int, int]:
        """Return numbers that change whenever an attempt is raised."""
        figures = func.count(), func.coalesce(func.sum(attempts.c.attempt), 0)
        ((count, total),) = self._database.fetch(select(*figures).where(self._of_table))
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
        """Raise the attempts of these slots, and return the slots that were raised.

        A slot is not raised if the run ``raised_by`` has raised it before, if its last attempt is
        open, or if its present attempt is not ``settled``. ``draw``: the seed is drawn, even if the
        table fixes it.
        """

        def write(connection: Connection) -> list[tuple[str, int]]:
            raised = []
            # Sorted, so that two runs do not deadlock.
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
                    # A slot without a row is not locked: another run has just inserted it.
            return raised

        return self._database.write("raise attempts in", write)

    def open_slots(self) -> frozenset[tuple[str, int]]:
        """Return the slots whose last attempt no run has ended with."""
        raised = raised_attempts.c
        query = select(raised.prompt_id, raised.sample).where(
            raised.table_id == self._table_id, raised.ended_at.is_(None)
        )
        return frozenset((row.prompt_id, row.sample) for row in self._database.fetch(query))

    def close_slots(self, slots: Iterable[tuple[str, int, int]], *, at: datetime) -> None:
        """Note that a run has ended with these (prompt_id, sample, attempt).

        Attempts that were raised since then stay open.
        """

        def write(connection: Connection) -> None:
            for prompt_id, sample, attempt in sorted(set(slots)):
                connection.execute(
                    update(raised_attempts)
                    .where(
                        self._raised_for((prompt_id, sample)),
                        raised_attempts.c.attempt <= attempt,
                        raised_attempts.c.ended_at.is_(None),
                    )
                    .values(ended_at=at)
                )

        self._database.write("close attempts in", write)

    def replace(
        self, slots: Iterable[tuple[str, int, int]], *, raised_by: str, at: datetime
    ) -> list[tuple[str, int]]:
        """Raise these (prompt_id, sample, attempt), and return the slots that were raised.

        A slot is raised only if the attempt is still the given one, so that of two runs that
        replace the same image, one buys.
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
        """Raise a slot's attempt if it is still this one, and return whether it was."""
        name = {"table_id": self._table_id, "prompt_id": slot[0], "sample": slot[1]}
        values: dict[str, Any] = {"attempt": attempt + 1, "at": at, "raised_by": raised_by}
        drawn = {"draws": True} if draw else {}
        statement: Any
        if attempt == 0:
            rows = insertion(connection, attempts).values(**name, **values, **drawn)
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
        """Return a slot's attempt, and lock its row, if it has one."""
        found = connection.execute(
            select(attempts.c.attempt).where(self._is(slot)).with_for_update()
        )
        return found.scalar() or 0

    def _is_open(
        self, connection: Connection, slot: tuple[str, int], attempt: int, raised_by: str
    ) -> bool:
        """Return whether this run has raised the slot before, or its attempt is open."""
        mine = raised_attempts.c.raised_by == raised_by
        open_ = and_(raised_attempts.c.attempt == attempt, raised_attempts.c.ended_at.is_(None))
        found = connection.execute(
            select(raised_attempts.c.attempt).where(self._raised_for(slot), mine | open_)
        )
        return found.first() is not None

    def _is(self, slot: tuple[str, int]) -> Any:
        return and_(self._of_table, attempts.c.prompt_id == slot[0], attempts.c.sample == slot[1])

    def _raised_for(self, slot: tuple[str, int]) -> Any:
        return and_(
            raised_attempts.c.table_id == self._table_id,
            raised_attempts.c.prompt_id == slot[0],
            raised_attempts.c.sample == slot[1],
        )
