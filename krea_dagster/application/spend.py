"""What was spent: the spend tables brought up to date, sums of them, the report, the proof."""

from __future__ import annotations

from calendar import monthrange
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import date, datetime, timezone
from fractions import Fraction
from pathlib import Path

import duckdb
import pyarrow as pa

from krea_dagster import redact
from krea_dagster.application.backend import Backend
from krea_dagster.engine.budget import CREDITS_PER_USD, Budget
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError
from krea_dagster.spend.proof.findings import Proof, ProofFigures
from krea_dagster.spend.proof.verify import account_proof, verify
from krea_dagster.spend.report.report import write_report
from krea_dagster.spend.tables.daily import DAILY_SCHEMA
from krea_dagster.spend.tables.ledger import exact_rate
from krea_dagster.spend.tables.query import (
    FIGURES,
    SpendLine,
    open_tables,
    prompt_texts,
    run_query,
    stored_tables,
    sums,
)
from krea_dagster.spend.tables.state import SpendState
from krea_dagster.spend.tables.update import SpendUpdate, update_spend
from krea_dagster.spend.warnings.warnings import SpendWarning


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
    rate, _ = _as_kept(storage)
    return Spend(names, lines, since, until, exact_rate(rate), redact.location(storage.locate("")))


def answer_of(backend: Backend, query: str, prompts: str | None = None) -> pa.Table:
    """Answer one SELECT over the views. Raises ConfigError or JournalError."""
    with closing(_opened(backend, prompts)) as duck:
        return run_query(duck, query)


def report_of(
    backend: Backend, path: Path, *, by: Sequence[str] = (), now: datetime | None = None
) -> list[SpendWarning]:
    """Write the HTML report, and return its warnings. Raises ConfigError or JournalError."""
    now = now or datetime.now(timezone.utc)
    storage = backend.open_storage()
    rate, own = _as_kept(storage)
    # What daily does not keep apart yet is added to what it does.
    wanted = [*own, *(name for name in by if name not in DAILY_SCHEMA.names)]
    wanted += backend.budget_columns()
    update_tables(backend, credits_per_usd=rate, by=tuple(dict.fromkeys(wanted)))
    tables = stored_tables(storage)
    with backend.open_journal() as journal:
        account = account_proof(journal)
    caps = backend.caps()
    budgets = [*caps.budgets]
    if caps.day_units is not None:
        budgets.append(Budget("day", caps.day_units))
    return write_report(
        tables,
        path,
        now=now,
        rate=rate,
        caps=budgets,
        by=by or own,
        account=account,
        prompts=lambda ids: prompt_texts(storage, ids),
    )


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


def prove(
    backend: Backend,
    *,
    hash_bytes: int | None = None,
    on_progress: Callable[[ProofFigures], None] = lambda _: None,
) -> Proof:
    """Prove that journal, files, manifests and account agree; see ``spend.proof.verify``.

    ``hash_bytes`` bounds how many bytes of images are hashed again; None hashes all. Raises
    ConfigError if there is no journal, and JournalError if it cannot be read.
    """
    storage = backend.open_storage()
    if not backend.has_journal():
        raise ConfigError(f"{storage.shown('')} has no journal yet: there is nothing to verify")
    backend.check_root()
    with backend.open_journal() as journal:
        return verify(journal, storage, hash_bytes=hash_bytes, on_progress=on_progress)


def _opened(backend: Backend, prompts: str | None = None) -> duckdb.DuckDBPyConnection:
    """Bring the tables up to date, as they are kept apart, and open the views."""
    storage = backend.open_storage()
    rate, by = _as_kept(storage)
    update_tables(backend, credits_per_usd=rate, by=by)
    return open_tables(storage, prompts)


def _as_kept(storage: Storage) -> tuple[float, tuple[str, ...]]:
    """The rate of the tables on file, and the columns that they keep apart; else the defaults."""
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
