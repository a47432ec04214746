"""The HTML report on what was spent."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from krea_dagster.application.backend import Backend
from krea_dagster.application.spend import as_kept, update_tables
from krea_dagster.engine.budget import Budget
from krea_dagster.spend.proof.verify import account_proof
from krea_dagster.spend.report.report import write_report
from krea_dagster.spend.tables.daily import DAILY_SCHEMA
from krea_dagster.spend.tables.query import prompt_texts, stored_tables
from krea_dagster.spend.warnings.warnings import SpendWarning


def report_of(
    backend: Backend, path: Path, *, by: Sequence[str] = (), now: datetime | None = None
) -> list[SpendWarning]:
    """Write the HTML report, and return its warnings. Raises ConfigError or JournalError."""
    now = now or datetime.now(timezone.utc)
    storage = backend.open_storage()
    rate, own = as_kept(storage)
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
