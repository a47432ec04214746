"""What a person enters of the account, and the server does not say: append only.

An entry has an identity, so that it is entered once, however often a file is imported. A wrong one
is reversed by a correction that names it.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import date, datetime
from typing import Any, Final

from sqlalchemy import Connection, func, insert, or_, select

from krea_dagster.engine.journal.database import DatabaseLog
from krea_dagster.engine.journal.rows import chunks
from krea_dagster.engine.journal.schema import account_entries, submissions
from krea_dagster.engine.journal.sql import lock_transaction
from krea_dagster.errors import InputError
from krea_dagster.models import credits_text

#: Credits that were bought; that were given; that a purchase, or the account, got back; and what
#: else changed a charge, or reverses a wrong entry.
TOP_UP: Final = "top-up"
PROMOTION: Final = "promotion"
REFUND: Final = "refund"
CORRECTION: Final = "correction"
KINDS: Final = (TOP_UP, PROMOTION, REFUND, CORRECTION)

#: The advisory lock of PostgreSQL for writers of entries: a number that no other lock has.
_WRITING: Final = 4_705_170_320


@dataclass(frozen=True)
class AccountEntry:
    """An entry: credits in units, and what was paid for them in 1/10,000 of the currency.

    Units are more than 0, except those of a correction, which are negative where credits were
    taken. ``idempotency_key`` names the purchase that a refund or correction belongs to,
    ``reverses`` the entry that a correction reverses.
    """

    kind: str
    day: date
    units: int
    paid_units: int | None = None
    currency: str | None = None
    reference: str | None = None
    note: str | None = None
    idempotency_key: str | None = None
    reverses: str | None = None
    entry_id: str = ""
    entered_at: datetime | None = None

    def identified(self) -> AccountEntry:
        """Return the entry with its id: a hash of all but the note, unless it has one."""
        said = [getattr(self, one.name) for one in fields(self)[:9] if one.name != "note"]
        digest = hashlib.sha256(b"krea-dagster/1/entry" + repr(said).encode()).hexdigest()
        return replace(self, entry_id=self.entry_id or digest[:12])


@dataclass(frozen=True)
class EnteredRows:
    """What ``EntryLog.add`` did: the entries that are new, and those that were known."""

    added: Sequence[AccountEntry]
    known: Sequence[AccountEntry]


class EntryLog(DatabaseLog):
    """The account's entries in a journal's database."""

    def all(self) -> list[AccountEntry]:
        """Return all entries, by day. Raises JournalError."""
        with self._database.read() as connection:
            return read_entries(connection)

    def purchases(self, names: Collection[str]) -> Mapping[str, str]:
        """Return the Idempotency-Key of each name, a task's id or a key; unknown ones are left out.

        Raises JournalError.
        """
        columns = submissions.c.task_id, submissions.c.idempotency_key
        found: dict[str, str] = {}
        for part in chunks(sorted(names)):
            query = select(*columns).where(or_(*(one.in_(part) for one in columns)))
            for task_id, key in self._database.fetch(query):
                found |= {name: key for name in (task_id, key) if name in names}
        return found

    def add(
        self, entries: Sequence[AccountEntry], at: datetime, places: Sequence[str] = ()
    ) -> EnteredRows:
        """Enter all entries, or none if one is wrong. An entry that is known is not entered again.

        ``places`` say where each entry is from. Raises InputError, which names the place and the
        column of each wrong entry, and JournalError.
        """

        def write(connection: Connection) -> EnteredRows:
            lock_transaction(connection, _WRITING)
            merge = _EntryMerge(connection, read_entries(connection))
            for number, entry in enumerate(entries):
                merge.take(entry, places[number] if places else "")
            if merge.wrong:
                raise wrong_entries(merge.wrong)
            added = [replace(one, entered_at=at) for one in merge.added]
            if added:
                connection.execute(insert(account_entries), list(map(_row, added)))
            return EnteredRows(added, merge.known)

        return self._database.write("enter into", write)


def wrong_entries(sentences: Sequence[str]) -> InputError:
    """Return the error of entries that are wrong, with a sentence on each."""
    count = "1 entry is" if len(sentences) == 1 else f"{len(sentences)} entries are"
    return InputError(f"{count} wrong, and nothing was entered:\n" + "\n".join(sentences))


def read_entries(connection: Connection) -> list[AccountEntry]:
    """Return all entries, by day."""
    names = [one.name for one in fields(AccountEntry)]
    order = (account_entries.c.day, account_entries.c.entered_at, account_entries.c.entry_id)
    found = connection.execute(
        select(*(account_entries.c[name] for name in names)).order_by(*order)
    )
    rows = [dict(zip(names, row, strict=True)) for row in found]
    return [AccountEntry(**{**row, "day": date.fromisoformat(row["day"])}) for row in rows]


def counted_kinds(entries: Iterable[AccountEntry]) -> dict[str, str]:
    """Return what each entry counts as, by id: a reversal as the kind that it reverses."""
    kinds = {one.entry_id: one.kind for one in entries}
    return {one.entry_id: kinds[one.reverses or one.entry_id] for one in entries}


def _row(entry: AccountEntry) -> dict[str, Any]:
    return {**vars(entry), "day": entry.day.isoformat()}


class _EntryMerge:
    """Decides which entries are new, one after the other."""

    def __init__(self, connection: Connection, known: Sequence[AccountEntry]) -> None:
        self.added: list[AccountEntry] = []
        self.known: list[AccountEntry] = []
        self.wrong: list[str] = []
        self._connection = connection
        self._by_id = {one.entry_id: one for one in known}
        self._reversed = {one.reverses: one for one in known if one.reverses}
        self._refunded: defaultdict[str | None, int] = defaultdict(int)
        self._seen: dict[str, str] = {}
        for one in known:
            self._refunded[one.idempotency_key] += one.units

    def take(self, given: AccountEntry, place: str) -> None:
        """Take one entry, or note why it is wrong."""
        try:
            entry = self._completed(given).identified()
            if not self._is_known(entry):
                self._check(entry)
                self._remember(entry)
            self._seen[entry.entry_id] = place or "another entry"
        except InputError as error:
            self.wrong.append(f"{place}: {error}" if place else str(error))

    def _completed(self, given: AccountEntry) -> AccountEntry:
        """Return a reversal with what it takes from the entry that it reverses."""
        if given.reverses is None:
            return given
        wrong = self._by_id.get(given.reverses)
        if wrong is None:
            raise InputError(f"reverses: there is no entry {given.reverses}")
        if wrong.reverses is not None:
            raise InputError(f"reverses: {given.reverses} is a reversal itself; enter it again")
        if given.units not in (0, -wrong.units):
            raise InputError(
                f"credits: a reversal of {given.reverses} is {credits_text(-wrong.units)}; leave "
                "it empty"
            )
        return replace(
            given,
            units=-wrong.units,
            paid_units=None if wrong.paid_units is None else -wrong.paid_units,
            currency=wrong.currency,
            idempotency_key=wrong.idempotency_key,
        )

    def _is_known(self, entry: AccountEntry) -> bool:
        if entry.entry_id in self._seen:
            raise InputError(
                f"id: it repeats {self._seen[entry.entry_id]}; give each an id if both are true"
            )
        known = self._by_id.get(entry.entry_id)
        if known is None:
            return False
        names = [one.name for one in fields(entry) if one.name != "entered_at"]
        if differing := [one for one in names if getattr(known, one) != getattr(entry, one)]:
            raise InputError(
                f"id: {entry.entry_id} is known with another "
                f"{', '.join(differing).replace('units', 'credits')}; reverse that one, or give "
                "this one another id"
            )
        self.known.append(known)
        return True

    def _check(self, entry: AccountEntry) -> None:
        if entry.reverses in self._reversed and entry.reverses:
            by = self._reversed[entry.reverses].entry_id
            raise InputError(f"reverses: {entry.reverses} is reversed already, by {by}")
        key = entry.idempotency_key
        if key is None or entry.units < 0:
            return
        query = select(func.coalesce(submissions.c.charged_units, submissions.c.committed_units))
        most = self._connection.execute(query.where(submissions.c.idempotency_key == key)).scalar()
        if self._refunded[key] + entry.units > int(most or 0):
            raise InputError(
                f"credits: {credits_text(entry.units)} is more than is left of the charge of "
                f"purchase {key}: {credits_text(int(most or 0) - self._refunded[key])}. Enter what "
                "is beyond it as a promotion"
            )

    def _remember(self, entry: AccountEntry) -> None:
        self.added.append(entry)
        self._by_id[entry.entry_id] = entry
        self._refunded[entry.idempotency_key] += entry.units
        if entry.reverses:
            self._reversed[entry.reverses] = entry
