"""Verdicts on images: who kept, rejected or flagged which image, and when. Append only.

The last verdict on an image counts; the earlier ones are its history. Tags and a note belong to a
verdict. A row that only annotates repeats the verdict before it: readers of the last row need to
know nothing of it, and the verdict that counts keeps its reviewer and time (``said_after``).

The caller chooses the id of a verdict, so that a verdict that is sent again, because no answer
came, is stored once.

PostgreSQL assigns numbers before it commits. A reader could see number 8, continue from there, and
never see number 7. So a writer locks the table until its commit: numbers become visible in order,
and readers never wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, Select, func, insert, select, text

from krea_dagster.engine.clock import SystemClock
from krea_dagster.engine.journal.database import Database, DatabaseLog
from krea_dagster.engine.journal.rows import chunks, rows_with
from krea_dagster.engine.journal.schema import verdicts
from krea_dagster.engine.verdict import (
    FLAG,
    KEEP,
    NONE,
    REJECT,
    TAG_SEPARATORS,
    VERDICTS,
    TagChange,
    Verdict,
)

__all__ = ["FLAG", "KEEP", "NONE", "REJECT", "VERDICTS", "TagChange", "Verdict", "VerdictLog"]

_COMMA: Final = TAG_SEPARATORS[0]

#: From this number of images on, reading the verdicts of all images is faster.
_MANY: Final = 5000


class VerdictLog(DatabaseLog):
    """The verdicts in a journal's database. Its methods may be called from several threads."""

    def __init__(
        self, database: Database, *, now: Callable[[], datetime] = SystemClock().now
    ) -> None:
        super().__init__(database)
        self._now = now

    @classmethod
    def open(
        cls,
        url: str,
        *,
        lock_timeout_s: float = 60.0,
        now: Callable[[], datetime] = SystemClock().now,
    ) -> VerdictLog:
        """Open the verdicts in the journal behind a SQLAlchemy URL. The caller closes them.

        Raises ConfigError for an unusable URL.
        """
        return cls(Database(url, lock_timeout_s=lock_timeout_s), now=now)

    def add(self, given: Sequence[Verdict]) -> list[Verdict]:
        """Add verdicts in one durable commit, and return them with their numbers and times.

        Two verdicts on one image keep the order of ``given``. What a verdict leaves out is taken
        from the one before it (``Verdict.after``). A verdict whose id exists is not added again:
        the existing one is returned instead. Raises InputError where one cannot be stored, or an
        image gets too many tags.
        """
        if not given:
            return []
        for one in given:
            one.check()

        def write(connection: Connection) -> list[Verdict]:
            if not self._database.sqlite:
                # Writers wait for each other, readers do not: see the module's docstring.
                connection.execute(text("LOCK TABLE verdicts IN SHARE ROW EXCLUSIVE MODE"))
            wanted = list(dict.fromkeys(one.verdict_id for one in given))
            known = _by_id(connection, wanted)
            at = self._now()  # with the lock held, so that times have the order of the numbers
            last = self._last(connection, {one.image_sha256 for one in given})
            new: dict[str, Verdict] = {}
            for one in given:
                if one.verdict_id not in known and one.verdict_id not in new:
                    before = last.get(one.image_sha256)
                    # On one image, times have the order of the numbers, although the clocks of
                    # several machines may differ.
                    now = at if before is None or before.at is None else max(at, before.at)
                    stored = one.after(before, one.at or now)
                    new[one.verdict_id] = last[one.image_sha256] = stored
            if new:
                end = connection.execute(select(func.max(verdicts.c.number))).scalar() or 0
                connection.execute(insert(verdicts), [_row(one) for one in new.values()])
                # With the lock held, all later numbers are those of this commit.
                numbers = select(verdicts.c.verdict_id, verdicts.c.number)
                added = connection.execute(numbers.where(verdicts.c.number > end)).all()
                known |= {name: replace(new[name], number=number) for name, number in added}
            return [known[one.verdict_id] for one in given]

        return self._database.write("write verdicts to", write)

    def current(self, image_sha256s: Iterable[str] | None = None) -> dict[str, Verdict]:
        """Return the verdict that counts, by the image's SHA-256, for these images or for all.

        Images without a verdict are left out.
        """
        wanted = None if image_sha256s is None else set(image_sha256s)
        return {
            sha256: one for sha256, one in self.annotated(wanted).items() if one.verdict != NONE
        }

    def annotated(self, image_sha256s: Iterable[str] | None = None) -> dict[str, Verdict]:
        """Return what ``current`` does, and images that only have tags or a note, or had a verdict.

        Their verdict is ``none``.
        """
        wanted = None if image_sha256s is None else set(image_sha256s)
        with self._database.read() as connection:
            last = self._last(connection, wanted)
            annotations = {sha256 for sha256, one in last.items() if one.annotates}
            judged = self._last(connection, annotations, of=_JUDGED) if annotations else {}
        return {sha256: one.said_after(judged.get(sha256)) for sha256, one in last.items()}

    @staticmethod
    def _last(
        connection: Connection,
        wanted: set[str] | None,
        of: Select[Any] | None = None,
    ) -> dict[str, Verdict]:
        """Return the last row of these images, or of all."""
        numbers = _ALL if of is None else of
        rows: list[Any] = []
        if wanted is None or len(wanted) > _MANY:
            rows += connection.execute(_last_of(numbers)).all()
        else:
            for chunk in chunks(sorted(wanted)):
                some = numbers.where(verdicts.c.image_sha256.in_(chunk))
                rows += connection.execute(_last_of(some)).all()
        return {
            row.image_sha256: _verdict(row)
            for row in rows
            if wanted is None or row.image_sha256 in wanted
        }

    def history(
        self, *, image_sha256: str | None = None, prompt_id: str | None = None
    ) -> list[Verdict]:
        """Return all verdicts in order: on an image, on a prompt, on both, or on everything."""
        query = _EVERY
        if image_sha256 is not None:
            query = query.where(verdicts.c.image_sha256 == image_sha256)
        if prompt_id is not None:
            query = query.where(verdicts.c.prompt_id == prompt_id)
        return self._read(query)

    def since(self, number: int) -> list[Verdict]:
        """Return the verdicts after this number, in order."""
        return self._read(_EVERY.where(verdicts.c.number > number))

    def last_number(self) -> int:
        """Return the number of the last verdict, or 0."""
        return self._database.fetch(select(func.max(verdicts.c.number)))[0][0] or 0

    def _read(self, query: Select[Any]) -> list[Verdict]:
        return [_verdict(row) for row in self._database.fetch(query)]


_EVERY: Final[Select[Any]] = select(verdicts).order_by(verdicts.c.number)
#: The number of each image's last verdict.
_ALL: Final = select(func.max(verdicts.c.number)).group_by(verdicts.c.image_sha256)
#: The same, without rows that only annotate.
_JUDGED: Final = _ALL.where(verdicts.c.annotates.is_(False))


def _last_of(numbers: Select[Any]) -> Select[Any]:
    return select(verdicts).where(verdicts.c.number.in_(numbers))


def _by_id(connection: Connection, verdict_ids: Iterable[str]) -> dict[str, Verdict]:
    rows = rows_with(connection, select(verdicts), verdicts.c.verdict_id, verdict_ids)
    return {row.verdict_id: _verdict(row) for row in rows}


def _row(one: Verdict) -> dict[str, Any]:
    """Return the row without its number, which the database assigns."""
    row = {name: value for name, value in vars(one).items() if name not in _NOT_STORED}
    row["tags"] = _COMMA.join(one.tags or ()) or None
    return row


#: The number is assigned by the database, and a change of tags is stored as its result.
_NOT_STORED: Final = frozenset({"number", "tag_change"})


_NAMES: Final = tuple(verdicts.c.keys())


def _verdict(row: Any) -> Verdict:
    columns = dict(zip(_NAMES, row, strict=True))
    columns["tags"] = tuple(columns["tags"].split(_COMMA)) if columns["tags"] else ()
    return Verdict(**columns)
