"""What was spent: the spend tables brought up to date, and sums of them."""

from __future__ import annotations

from calendar import monthrange
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import date, datetime, timezone
from fractions import Fraction

import duckdb
import pyarrow as pa

from krea_dagster import redact
from krea_dagster.application.backend import Backend
from krea_dagster.engine.budget import CREDITS_PER_USD
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError
from krea_dagster.file_systems import Options
from krea_dagster.spend.tables.ledger import exact_rate
from krea_dagster.spend.tables.query import (
    FIGURES,
    SpendLine,
    open_tables,
    run_query,
    sums,
)
from krea_dagster.spend.tables.state import SpendState
from krea_dagster.spend.tables.update import SpendUpdate, update_spend


@dataclass(frozen=True)
class Spend:
    """Sums by the columns ``by``, from ``since`` to ``until`` (UTC days, both included).

    ``rate`` is how many credits one US dollar buys.
    """

    by: tuple[str, ...]
    lines: Sequence[SpendLine]
    since: date | None
    until: date | None
    rate: Fraction
    where: str


def spend_of(
    backend: Backend,
    by: Sequence[str] = (),
    *,
    since: date | None = None,
    month: str | None = None,
    now: datetime | None = None,
) -> Spend:
    """Say what was spent: today, this month and in all, or by some columns.

    ``month`` is one UTC month, as ``YYYY-MM``. Brings the tables up to date first. Raises
    ConfigError or JournalError.
    """
    until = None
    if month is not None:
        since, until = _days_of(month)
    with closing(_opened(backend)) as duck:
        if by:
            lines = sums(duck, by, since=since, until=until)
            names = tuple(by)
        else:
            today = (now or datetime.now(timezone.utc)).astimezone(timezone.utc).date()
            first = today.replace(day=1)
            spans = {
                "today": (today, today),
                f"{today:%Y-%m}": (first, today),
                "in all": (None, None),
            }
            if since is not None or until is not None:
                spans = {month or f"since {since}": (since, until)}
            names = ("when",)
            lines = [
                _named(name, line)
                for name, (start, end) in spans.items()
                for line in sums(duck, since=start, until=end)
            ]
    storage = backend.open_storage()
    rate, _ = as_kept(storage)
    return Spend(names, lines, since, until, exact_rate(rate), redact.location(storage.locate("")))


def answer_of(
    backend: Backend,
    query: str,
    prompts: str | None = None,
    prompts_options: Options | None = None,
) -> pa.Table:
    """Answer one SELECT over the views. Raises ConfigError or JournalError."""
    with closing(_opened(backend, prompts, prompts_options)) as duck:
        return run_query(duck, query)


def update_tables(
    backend: Backend,
    *,
    credits_per_usd: float = CREDITS_PER_USD,
    by: Sequence[str] = (),
    rebuild: bool = False,
) -> SpendUpdate:
    """Bring the spend tables up to date. Raises ConfigError or JournalError."""
    storage = backend.open_storage()
    if not backend.has_journal():
        raise ConfigError(f"{storage.shown('')} has no journal yet: nothing was spent")
    backend.check_root()
    with backend.open_journal() as journal:
        return update_spend(
            journal, storage, credits_per_usd=credits_per_usd, by=by, rebuild=rebuild
        )


def _opened(
    backend: Backend, prompts: str | None = None, prompts_options: Options | None = None
) -> duckdb.DuckDBPyConnection:
    """Bring the tables up to date, as they are kept apart, and open the views."""
    storage = backend.open_storage()
    rate, by = as_kept(storage)
    update_tables(backend, credits_per_usd=rate, by=by)
    return open_tables(storage, prompts, prompts_options)


def as_kept(storage: Storage) -> tuple[float, tuple[str, ...]]:
    """Return the rate of the tables on file, and the columns that they keep apart."""
    known = SpendState.read(storage)
    if known is None:
        return CREDITS_PER_USD, ()
    return float(Fraction(known.credits_per_usd)), known.by


def _named(name: str, line: SpendLine) -> SpendLine:
    return SpendLine((name,), *(getattr(line, one) for one in FIGURES))


def _days_of(month: str) -> tuple[date, date]:
    try:
        first = datetime.strptime(month, "%Y-%m").replace(tzinfo=timezone.utc).date()
    except ValueError:
        raise ConfigError(f"{month!r} is not a month such as 2026-11") from None
    return first, first.replace(day=monthrange(first.year, first.month)[1])
