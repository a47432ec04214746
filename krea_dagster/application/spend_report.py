"""The HTML report on what was spent."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from krea_dagster.application.backend import Backend
from krea_dagster.application.spend import SpendPeriod, kept_columns, update_tables
from krea_dagster.spend.proof.verify import account_proof
from krea_dagster.spend.report.report import write_report
from krea_dagster.spend.tables.query import prompt_texts, stored_tables
from krea_dagster.spend.warnings.budgets import hard_budgets
from krea_dagster.spend.warnings.spend_warning import SpendWarning


def report_of(
    backend: Backend,
    path: Path,
    *,
    by: Sequence[str] = (),
    period: SpendPeriod | None = None,
    now: datetime | None = None,
) -> list[SpendWarning]:
    """Write the HTML report, and return its warnings. Raises ConfigError or JournalError."""
    period = period or SpendPeriod(zone=backend.settings.timezone)
    storage = backend.open_storage()
    own = kept_columns(storage)
    update_tables(backend, by=own)
    with backend.open_journal() as journal:
        account = account_proof(journal)
        acknowledgements = journal.acknowledgements.current()
        accounts = journal.balances.accounts()
    return write_report(
        stored_tables(storage),
        path,
        now=now or datetime.now(timezone.utc),
        prices=backend.credit_prices(),
        caps=hard_budgets(backend.caps()),
        by=by or own,
        account=account,
        prompts=lambda ids: prompt_texts(storage, ids),
        soft=backend.soft_budgets(),
        acknowledgements=acknowledgements,
        threshold=backend.settings.spend_threshold,
        accounts=accounts,
        balance_days=backend.settings.balance_days,
        since=period.since,
        until=period.until,
        zone=period.zone,
    )
