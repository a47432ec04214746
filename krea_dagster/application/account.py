"""What a person enters of the account: refunds, credits bought or given, corrections."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Final

from krea_dagster.application.backend import Backend
from krea_dagster.csv_files import read_csv
from krea_dagster.engine.journal.entry_log import (
    CORRECTION,
    KINDS,
    REFUND,
    TOP_UP,
    AccountEntry,
    EnteredRows,
    wrong_entries,
)
from krea_dagster.errors import InputError
from krea_dagster.models import MOST_CREDITS, UNITS_PER_CREDIT

#: The columns of a CSV file of entries. ``account list --csv`` writes them, too.
ENTRY_COLUMNS: Final = (
    *("id", "on", "kind", "credits", "paid", "currency", "reference", "task", "purchase"),
    *("reverses", "note"),
)
_NEEDED: Final = ("on", "kind", "credits")


def entries_of(backend: Backend) -> list[AccountEntry]:
    """Return all entries, by day. Raises ConfigError without a journal, and JournalError."""
    with backend.existing_journal("entries") as journal:
        return journal.entries.all()


def add_entries(
    backend: Backend,
    rows: Sequence[Mapping[str, str]],
    places: Sequence[str] = (),
    *,
    now: datetime | None = None,
) -> EnteredRows:
    """Enter rows of ``ENTRY_COLUMNS`` as text: all of them, or none if one is wrong.

    ``places`` say where each row is from. Raises InputError, which names the row and the column,
    ConfigError without a journal, and JournalError.
    """
    now = now or datetime.now(timezone.utc)
    entries, wrong = [], []
    with backend.existing_journal("entries") as journal:
        names = {row.get(one) for row in rows for one in ("task", "purchase")}
        purchases = journal.entries.purchases({name for name in names if name})
        for number, row in enumerate(rows):
            try:
                entries.append(_entry(row, purchases, now.astimezone(timezone.utc).date()))
            except InputError as error:
                wrong.append(f"{places[number]}: {error}" if places else str(error))
        if wrong:
            raise wrong_entries(wrong)
        return journal.entries.add(entries, now, places)


def import_entries(backend: Backend, path: Path) -> EnteredRows:
    """Enter the rows of a CSV file: all of them, or none if one is wrong.

    Raises InputError for a file that cannot be read, and as ``add_entries``.
    """
    try:
        names, numbered = read_csv(path)
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if unknown := [name for name in names if name not in (*ENTRY_COLUMNS, "entered_at")]:
        raise InputError(f"{path} has a column {unknown[0]!r}; use {', '.join(ENTRY_COLUMNS)}")
    if missing := [name for name in _NEEDED if name not in names]:
        raise InputError(f"{path} has no column {missing[0]}; it has {', '.join(names) or 'none'}")
    if uneven := [number for number, cells in numbered if len(cells) != len(names)]:
        raise InputError(f"{path.name} row {uneven[0]}: it has not {len(names)} cells")
    return add_entries(
        backend,
        [dict(zip(names, cells, strict=True)) for _, cells in numbered],
        [f"{path.name} row {number}" for number, _ in numbered],
    )


def _entry(row: Mapping[str, str], purchases: Mapping[str, str], today: date) -> AccountEntry:
    """Return the entry that a row says. Raises InputError, which begins with the column."""
    said = {name: text.strip() for name, text in row.items() if text and text.strip()}
    kind = said.get("kind", "")
    if kind not in KINDS:
        raise InputError(f"kind: {kind!r} is not one of {', '.join(KINDS)}")
    reverses = said.get("reverses")
    if reverses and kind != CORRECTION:
        raise InputError(f"reverses: only a correction reverses an entry, not a {kind}")
    units = 0 if reverses and "credits" not in said else _units(said, "credits")
    if not reverses:
        if kind == CORRECTION and not said.get("note"):
            raise InputError("note: say what a correction corrects, or which entry it reverses")
        if units == 0 or (units < 0 and kind != CORRECTION):
            raise InputError(f"credits: a {kind} of {said['credits']} is not possible")
    paid = None if "paid" not in said or reverses else _units(said, "paid")
    if paid is not None and (paid < 0 or kind != TOP_UP):
        raise InputError("paid: only a top-up is paid for, with 0 or more")
    currency = said.get("currency") if paid is not None else None
    if paid is not None and not _is_currency(currency or ""):
        raise InputError("currency: say it with paid, as three capital letters such as EUR")
    return AccountEntry(
        kind,
        _day(said.get("on"), today),
        units,
        paid,
        currency,
        said.get("reference"),
        said.get("note"),
        _purchase(said, kind, purchases),
        reverses,
        said.get("id", ""),
    )


def _is_currency(text: str) -> bool:
    return len(text) == 3 and text.isascii() and text.isalpha() and text.isupper()


def _day(text: str | None, today: date) -> date:
    try:
        day = today if text is None else date.fromisoformat(text)
    except ValueError:
        raise InputError(f"on: {text!r} is not a day such as 2026-10-02") from None
    if day > today + timedelta(days=1):  # that may be today elsewhere
        raise InputError(f"on: {day} is in the future")
    return day


def _units(said: Mapping[str, str], name: str) -> int:
    text = said.get(name, "")
    try:
        units = Decimal(text) * UNITS_PER_CREDIT
    except InvalidOperation:
        units = Decimal("NaN")
    if not units.is_finite() or units % 1 or abs(units) > MOST_CREDITS * UNITS_PER_CREDIT:
        raise InputError(
            f"{name}: {text!r} is not a number with at most 4 decimals, such as 5000 or 4.5"
        )
    return int(units)


def _purchase(said: Mapping[str, str], kind: str, purchases: Mapping[str, str]) -> str | None:
    named = {name: said[name] for name in ("task", "purchase") if name in said}
    if named and kind not in (REFUND, CORRECTION):
        raise InputError(f"{next(iter(named))}: a {kind} belongs to no purchase")
    for name, text in named.items():
        if text not in purchases:
            raise InputError(f"{name}: the journal has no purchase with {text!r}")
    keys = {purchases[text] for text in named.values()}
    if len(keys) > 1:
        raise InputError("task: it is not the task of that purchase")
    return next(iter(keys), None)
