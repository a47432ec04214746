"""What was spent: the spend tables brought up to date, and sums of them."""

from __future__ import annotations

from calendar import monthrange
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timezone
from zoneinfo import ZoneInfo

import pyarrow as pa

from krea_dagster import redact
from krea_dagster.application.backend import Backend
from krea_dagster.application.spend_warnings import history_of, warnings_in
from krea_dagster.engine.journal.balance_log import AccountHistory
from krea_dagster.engine.journal.closed_month_log import ClosedMonth
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError
from krea_dagster.file_systems import Options
from krea_dagster.spend.prices import CreditPrices
from krea_dagster.spend.tables.ledger import LEDGER_SCHEMA
from krea_dagster.spend.tables.query import (
    MADE,
    EntrySums,
    SpendLine,
    entry_sums,
    from_today,
    open_tables,
    run_query,
    sums,
)
from krea_dagster.spend.tables.sql import DuckDB
from krea_dagster.spend.tables.state import SpendState
from krea_dagster.spend.tables.update import SpendUpdate, update_spend
from krea_dagster.spend.tables.views import is_utc
from krea_dagster.spend.warnings.history import Balance, BudgetUse
from krea_dagster.spend.warnings.spend_warning import SpendWarning


@dataclass(frozen=True)
class SpendPeriod:
    """The days that are asked for, both included, in a time zone; None for no limit."""

    since: date | None = None
    until: date | None = None
    zone: str = "UTC"
    name: str = ""

    @classmethod
    def of(
        cls, since: date | None, until: date | None, month: str | None, zone: str
    ) -> SpendPeriod:
        """Return a period. Raises ConfigError for a malformed one, or one without days."""
        is_utc(zone)
        if month is not None:
            return cls(*_days_of(month), zone, month)
        if since is not None and until is not None and until < since:
            raise ConfigError(f"there is no day from {since} to {until}")
        words = [f"{word} {day}" for word, day in (("since", since), ("until", until)) if day]
        return cls(since, until, zone, " ".join(words))

    @property
    def is_limited(self) -> bool:
        """Whether it is not all time."""
        return self.since is not None or self.until is not None

    def today(self, now: datetime) -> date:
        """Return the present day."""
        return now.astimezone(ZoneInfo(self.zone)).date()


@dataclass(frozen=True)
class Spend:
    """Sums by columns in a period, its account entries, all budgets with their use, warnings.

    ``prices`` are those of a credit. ``closed`` is the period where it is a closed month, and
    ``since_closed`` are the units that were charged and refunded since. ``from_today`` counts, for
    columns of the prompt table, the purchases that were not written with them: they count as
    today's table says.
    """

    by: tuple[str, ...]
    lines: Sequence[SpendLine]
    period: SpendPeriod
    prices: CreditPrices
    where: str
    budgets: Sequence[BudgetUse] = ()
    entries: EntrySums = field(default_factory=EntrySums)
    closed: ClosedMonth | None = None
    since_closed: tuple[int, int] = (0, 0)
    warnings: Sequence[SpendWarning] = ()
    balances: Sequence[Balance] = ()
    from_today: Mapping[str, int] = field(default_factory=dict)

    @property
    def currencies(self) -> list[str]:
        """The currencies of the prices and of the lines."""
        named = [price.currency for _, price in self.prices.steps]
        return sorted({*named, *(name for line in self.lines for name in line.costs())})


def spend_of(
    backend: Backend,
    by: Sequence[str] = (),
    *,
    period: SpendPeriod | None = None,
    now: datetime | None = None,
) -> Spend:
    """Say what was spent: today, this month and in all, or by some columns.

    Brings the tables up to date first. Raises ConfigError or JournalError.
    """
    period = period or SpendPeriod(zone=backend.settings.timezone)
    now = now or datetime.now(timezone.utc)
    needs_manifest = bool({*by} - MADE.keys() - {*LEDGER_SCHEMA.names})
    with closing(_opened(backend, period.zone, manifest=needs_manifest)) as duck:
        if by:
            lines = sums(duck, by, since=period.since, until=period.until)
            names = tuple(by)
        else:
            names, lines = ("when",), _by_time(duck, period, now)
        entered = entry_sums(duck, period.since, period.until)
        today = from_today(duck, by) if needs_manifest else {}
        closed, since_closed = _closed(backend, duck, period)
    history = history_of(backend, now=now, account=False)
    return Spend(
        names,
        lines,
        period,
        backend.credit_prices(),
        redact.location(backend.open_storage().locate("")),
        history.budgets,
        entered,
        closed,
        since_closed,
        warnings_in(backend, history, now),
        history.balances,
        today,
    )


def _closed(
    backend: Backend, duck: DuckDB, period: SpendPeriod
) -> tuple[ClosedMonth | None, tuple[int, int]]:
    """Return the closed month that a period is, and the units charged and refunded since."""
    if not period.name or not is_utc(period.zone):
        return None, (0, 0)
    with backend.open_journal() as journal:
        found = [one for one in journal.closed_months.all() if one.month == period.name]
    if not found:
        return None, (0, 0)
    (line,) = sums(duck, since=period.since, until=period.until)
    (one,) = found
    return one, (line.charged_units - one.charged_units, line.refunded_units - one.refunded_units)


def _by_time(duck: DuckDB, period: SpendPeriod, now: datetime) -> list[SpendLine]:
    """Return the sums of the period; of today, this month and all time where it has no limit."""
    today = period.today(now)
    spans: dict[str, tuple[date | None, date | None]] = {
        "today": (today, today),
        f"{today:%Y-%m}": (today.replace(day=1), today),
        "in all": (None, None),
    }
    if period.is_limited:
        spans = {period.name: (period.since, period.until)}
    return [
        replace(line, of=(name,))
        for name, (start, end) in spans.items()
        for line in sums(duck, since=start, until=end)
    ]


def answer_of(
    backend: Backend,
    query: str,
    prompts: str | None = None,
    prompts_options: Options | None = None,
    *,
    zone: str | None = None,
) -> pa.Table:
    """Answer one SELECT over the views. Raises ConfigError or JournalError."""
    names = ("manifest", "prompts", "attribution", "balance")
    needs = {name: name in query.lower() for name in names}
    opened = _opened(
        backend,
        zone or backend.settings.timezone,
        prompts if needs["prompts"] else None,
        prompts_options,
        manifest=needs["manifest"] or needs["attribution"],
        balance=needs["balance"],
    )
    with closing(opened) as duck:
        return run_query(duck, query)


def update_tables(
    backend: Backend,
    *,
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
            journal, storage, prices=backend.credit_prices(), by=by, rebuild=rebuild
        )


def _opened(
    backend: Backend,
    zone: str,
    prompts: str | None = None,
    prompts_options: Options | None = None,
    *,
    manifest: bool,
    balance: bool = False,
) -> DuckDB:
    """Bring the tables up to date, as they are kept apart, and open the views."""
    storage = backend.open_storage()
    update_tables(backend, by=kept_columns(storage))
    accounts: Sequence[AccountHistory] = ()
    if balance:
        with backend.open_journal() as journal:
            accounts = journal.balances.accounts()
    return open_tables(
        storage, prompts, prompts_options, manifest=manifest, zone=zone, accounts=accounts
    )


def kept_columns(storage: Storage) -> tuple[str, ...]:
    """Return the columns that the tables on file keep apart."""
    known = SpendState.read(storage)
    return () if known is None else known.by


def _days_of(month: str) -> tuple[date, date]:
    try:
        first = datetime.strptime(month, "%Y-%m").replace(tzinfo=timezone.utc).date()
    except ValueError:
        raise ConfigError(f"{month!r} is not a month such as 2026-11") from None
    return first, first.replace(day=monthrange(first.year, first.month)[1])
