"""Attempts: how often another picture was asked for of a row's sample, and by which run.

An attempt is part of a request, so that raising one asks for a new purchase. Therefore each is
raised by name, once, in a durable commit, and every time is kept with the run that asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from krea_dagster.engine.database import Database
from krea_dagster.engine.schema import attempts, raised_attempts


class AttemptLog:
    """The attempts in a journal's database. A slot is a prompt_id and a sample.

    Its methods block. Raises JournalError wherever the database cannot be read or written.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def present(self) -> dict[tuple[str, int], int]:
        """The attempt of each slot that was asked for again; all others are at 0."""
        with self._database.read("read") as connection:
            rows = connection.execute(
                select(attempts.c.prompt_id, attempts.c.sample, attempts.c.attempt)
            )
            return {(row.prompt_id, row.sample): row.attempt for row in rows}

    def ask_again(
        self, slots: Iterable[tuple[str, int]], *, raised_by: str, at: datetime
    ) -> list[tuple[str, int]]:
        """Ask for another picture of these slots, whatever they have; returns of which.

        Once for each ``raised_by``: a run that is executed again with the same wish asks for
        nothing, also where another run has asked in between.
        """
        raised = []
        with self._database.write("raise attempts in") as connection:
            # Sorted, so that two runs never wait for each other's row locks.
            for slot in sorted(set(slots)):
                while True:
                    attempt = _locked_attempt(connection, slot)
                    if _has_raised(connection, slot, raised_by):
                        break
                    if self._raise(connection, slot, attempt, raised_by, at):
                        raised.append(slot)
                        break
                    # Of a slot without a row nothing is locked: another run made it just now.
        return raised

    def replace(
        self, slots: Iterable[tuple[str, int, int]], *, raised_by: str, at: datetime
    ) -> list[tuple[str, int]]:
        """Ask for another picture in place of these (prompt_id, sample, attempt); returns of which.

        Only where the attempt is still the one that is named: of two runs that want the same
        picture replaced, one asks.
        """
        with self._database.write("raise attempts in") as connection:
            return [
                (prompt_id, sample)
                for prompt_id, sample, attempt in sorted(slots)
                if self._raise(connection, (prompt_id, sample), attempt, raised_by, at)
            ]

    def _raise(
        self,
        connection: Connection,
        slot: tuple[str, int],
        attempt: int,
        raised_by: str,
        at: datetime,
    ) -> bool:
        """Raise a slot's attempt where it still is this one, and tell whether it was."""
        name = dict(zip(("prompt_id", "sample"), slot, strict=True))
        values = {"attempt": attempt + 1, "at": at, "raised_by": raised_by}
        statement: Any
        if attempt == 0:
            new = sqlite.insert if self._database.sqlite else postgresql.insert
            statement = new(attempts).values(**name, **values).on_conflict_do_nothing()
        else:
            statement = (
                update(attempts)
                .where(
                    attempts.c.prompt_id == slot[0],
                    attempts.c.sample == slot[1],
                    attempts.c.attempt == attempt,
                )
                .values(**values)
            )
        if connection.execute(statement.returning(attempts.c.attempt)).first() is None:
            return False
        connection.execute(insert(raised_attempts).values(**name, **values))
        return True


def _locked_attempt(connection: Connection, slot: tuple[str, int]) -> int:
    """Return a slot's attempt; its row, if it has one, is locked until the commit."""
    found = connection.execute(
        select(attempts.c.attempt)
        .where(attempts.c.prompt_id == slot[0], attempts.c.sample == slot[1])
        .with_for_update()
    )
    return found.scalar() or 0


def _has_raised(connection: Connection, slot: tuple[str, int], raised_by: str) -> bool:
    found = connection.execute(
        select(raised_attempts.c.attempt).where(
            raised_attempts.c.prompt_id == slot[0],
            raised_attempts.c.sample == slot[1],
            raised_attempts.c.raised_by == raised_by,
        )
    )
    return found.first() is not None
