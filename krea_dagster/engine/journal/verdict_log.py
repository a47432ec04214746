"""Verdicts on images: who kept, rejected or flagged which picture, and when. Append only.

The last verdict on an image is the one that counts, and the earlier ones are its history. A
verdict is known by an id that whoever gives it has made, so that one that is sent again, because
no answer came, is remembered once.

PostgreSQL gives out numbers before it commits. Without care a reader could see number 8, go on
from there, and never see number 7. So whoever writes holds a lock on the table until its commit:
numbers become visible in their order, and a reader never waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from typing import Any, Final

from sqlalchemy import Connection, Select, func, insert, select, text

from krea_dagster.engine.journal.database import Database
from krea_dagster.engine.journal.rows import chunks
from krea_dagster.engine.journal.schema import verdicts
from krea_dagster.engine.verdict import FLAG, KEEP, NONE, REJECT, VERDICTS, Verdict

__all__ = ["FLAG", "KEEP", "NONE", "REJECT", "VERDICTS", "Verdict", "VerdictLog"]

#: From here on it is quicker to read every image's verdict than to ask for these.
_MANY: Final = 5000


def _utc_now() -> datetime:
    return datetime.now(timezone.utc)


class VerdictLog:
    """The verdicts in a journal's database, for those who judge and for those who read.

    Its methods block; they may be called from several threads. Raises JournalError wherever the
    database cannot be read or written.
    """

    def __init__(self, database: Database, *, now: Callable[[], datetime] = _utc_now) -> None:
        self._database = database
        self._now = now

    @classmethod
    def open(
        cls, url: str, *, lock_timeout_s: float = 60.0, now: Callable[[], datetime] = _utc_now
    ) -> VerdictLog:
        """The verdicts in the journal behind a SQLAlchemy URL; to be closed by whoever opened it.

        Raises ConfigError where the URL cannot be used.
        """
        return cls(Database(url, lock_timeout_s=lock_timeout_s), now=now)

    def __repr__(self) -> str:
        return f"VerdictLog({self._database.where!r})"

    def close(self) -> None:
        """Close the connections."""
        self._database.close()

    def add(self, given: Sequence[Verdict]) -> list[Verdict]:
        """Remember verdicts in one durable commit; returns them with their numbers and times.

        The later of two on one image is the later in ``given``. One whose id is known is not
        remembered again: the first that had it is returned in its place.
        """
        if not given:
            return []

        def write(connection: Connection) -> list[Verdict]:
            if not self._database.sqlite:
                # Writers wait for one another, readers do not: see above.
                connection.execute(text("LOCK TABLE verdicts IN SHARE ROW EXCLUSIVE MODE"))
            wanted = list(dict.fromkeys(one.verdict_id for one in given))
            known = _by_id(connection, wanted)
            at = self._now()  # once the lock is held, so that times follow the numbers
            new: dict[str, Verdict] = {}
            for one in given:
                if one.verdict_id not in known and one.verdict_id not in new:
                    new[one.verdict_id] = replace(one, at=one.at or at)
            if new:
                connection.execute(insert(verdicts), [_row(one) for one in new.values()])
                known |= _by_id(connection, list(new))
            return [known[one.verdict_id] for one in given]

        return self._database.write("remember verdicts in", write)

    def current(self, image_sha256s: Iterable[str] | None = None) -> dict[str, Verdict]:
        """The verdict that counts, by the image's SHA-256; images without one are left out.

        Of these images, or of all.
        """
        wanted = None if image_sha256s is None else set(image_sha256s)
        found: dict[str, Verdict] = {}
        with self._database.read("read the verdicts of") as connection:
            if wanted is None or len(wanted) > _MANY:
                rows = [_verdict(row) for row in connection.execute(_last_of(_ALL))]
                found = {
                    one.image_sha256: one
                    for one in rows
                    if wanted is None or one.image_sha256 in wanted
                }
            else:
                for chunk in chunks(sorted(wanted)):
                    among = _ALL.where(verdicts.c.image_sha256.in_(chunk))
                    for row in connection.execute(_last_of(among)):
                        found[row.image_sha256] = _verdict(row)
        return {key: one for key, one in found.items() if one.verdict != NONE}

    def history(
        self, *, image_sha256: str | None = None, prompt_id: str | None = None
    ) -> list[Verdict]:
        """Every verdict there ever was, in order: of an image, of a prompt, of both, or of all."""
        query = _EVERY
        if image_sha256 is not None:
            query = query.where(verdicts.c.image_sha256 == image_sha256)
        if prompt_id is not None:
            query = query.where(verdicts.c.prompt_id == prompt_id)
        return self._read(query)

    def since(self, number: int) -> list[Verdict]:
        """The verdicts after this number, in order. Whoever goes on from the last misses none."""
        return self._read(_EVERY.where(verdicts.c.number > number))

    def last_number(self) -> int:
        """The number of the last verdict, or 0."""
        with self._database.read("read the verdicts of") as connection:
            return connection.execute(select(func.max(verdicts.c.number))).scalar() or 0

    def _read(self, query: Select[Any]) -> list[Verdict]:
        with self._database.read("read the verdicts of") as connection:
            return [_verdict(row) for row in connection.execute(query)]


_EVERY: Final[Select[Any]] = select(verdicts).order_by(verdicts.c.number)
#: The number of each image's last verdict.
_ALL: Final = select(func.max(verdicts.c.number)).group_by(verdicts.c.image_sha256)


def _last_of(numbers: Select[Any]) -> Select[Any]:
    return select(verdicts).where(verdicts.c.number.in_(numbers))


def _by_id(connection: Connection, verdict_ids: Iterable[str]) -> dict[str, Verdict]:
    found: dict[str, Verdict] = {}
    for chunk in chunks(verdict_ids):
        query = select(verdicts).where(verdicts.c.verdict_id.in_(chunk))
        found.update((row.verdict_id, _verdict(row)) for row in connection.execute(query))
    return found


def _row(one: Verdict) -> dict[str, Any]:
    """The row, whose number the database gives."""
    row = asdict(one)
    del row["number"]
    return row


def _verdict(row: Any) -> Verdict:
    return Verdict(**row._mapping)  # noqa: SLF001 - SQLAlchemy's public name for it
