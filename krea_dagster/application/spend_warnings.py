"""The warnings in the spend tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Final

from krea_dagster.application.backend import Backend
from krea_dagster.engine.budget import Budget
from krea_dagster.spend.proof.verify import account_proof
from krea_dagster.spend.tables.query import stored_tables
from krea_dagster.spend.tables.state import SpendState
from krea_dagster.spend.warnings.budgets import hard_budgets
from krea_dagster.spend.warnings.history import SpendHistory
from krea_dagster.spend.warnings.load_history import observe
from krea_dagster.spend.warnings.spend_warning import SpendWarning
from krea_dagster.spend.warnings.warnings import find_warnings

#: Days after its last day for which a warning is recent.
RECENT_DAYS: Final = 7


def history_of(
    backend: Backend, budgets: Sequence[Budget] = (), *, now: datetime, account: bool = True
) -> SpendHistory:
    """Return the history in the spend tables that warnings are found in.

    ``budgets`` only warn, in addition to all of the settings. Without ``account`` the account is
    not compared with the journal, which reads every charge. Raises ConfigError for a budget of an
    unknown column, and JournalError.
    """
    hard, soft = hard_budgets(backend.caps()), [*budgets, *backend.soft_budgets()]
    has_columns = any(budget.name for budget in [*hard, *soft])
    with backend.open_journal() as journal:
        proof = account_proof(journal) if account else None
        acknowledged = journal.acknowledgements.current()
        accounts = journal.balances.accounts()
    history = observe(
        stored_tables(backend.open_storage(), manifest=has_columns),
        now=now,
        hard=hard,
        soft=soft,
        account=proof,
        acknowledgements=acknowledged,
        accounts=accounts,
    )
    return replace(history, balance_days=backend.settings.balance_days)


def recent_warnings(
    backend: Backend, budgets: Sequence[Budget] = (), *, now: datetime
) -> list[SpendWarning] | None:
    """Return the warnings of the last days; None without spend tables, and as ``history_of``."""
    known = SpendState.read(backend.open_storage())
    if known is None or not known.months or not backend.has_journal():
        return None
    return warnings_in(backend, history_of(backend, budgets, now=now), now)


def warnings_in(backend: Backend, history: SpendHistory, now: datetime) -> list[SpendWarning]:
    """Return the warnings of the last days in a history, by the threshold of the settings."""
    since = now.astimezone(timezone.utc).date() - timedelta(days=RECENT_DAYS)
    found = find_warnings(history, now, backend.settings.spend_threshold)
    return [one for one in found if one.until >= since]
