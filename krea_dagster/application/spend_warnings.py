"""The warnings in the spend tables, and what a person has acknowledged of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from typing import Final

from krea_dagster.application.backend import Backend
from krea_dagster.engine.budget import Budget
from krea_dagster.errors import ConfigError, InputError
from krea_dagster.spend.proof.verify import account_proof
from krea_dagster.spend.tables.query import stored_tables
from krea_dagster.spend.warnings.budgets import hard_budgets
from krea_dagster.spend.warnings.load_history import observe
from krea_dagster.spend.warnings.warnings import SpendWarning, find_warnings

#: Days after its last day for which a warning is recent.
RECENT_DAYS: Final = 7

_WARNING_ID: Final = re.compile(r"[0-9a-f]{10}", re.ASCII)


def recent_warnings(
    backend: Backend,
    budgets: Sequence[Budget] = (),
    *,
    now: datetime,
    account: bool = True,
    days: int | None = RECENT_DAYS,
) -> list[SpendWarning] | None:
    """Return the warnings of the last days (or of all) in the spend tables; None without tables.

    ``budgets`` only warn, in addition to all of the settings. Without ``account`` the account is
    not compared with the journal, which reads every charge. Raises ConfigError for a budget of an
    unknown column, and JournalError.
    """
    every = [*hard_budgets(backend.caps()), *budgets, *backend.soft_budgets()]
    has_columns = any(budget.name for budget in every)
    tables = stored_tables(backend.open_storage(), manifest=has_columns)
    if not tables.months or not backend.has_journal():
        return None
    with backend.open_journal() as journal:
        proof = account_proof(journal) if account else None
        acknowledged = journal.acknowledgements.current()
    history = observe(tables, now=now, budgets=every, account=proof, acknowledgements=acknowledged)
    found = find_warnings(history, now, backend.settings.spend_threshold)
    if days is None:
        return found
    since = now.astimezone(timezone.utc).date() - timedelta(days=days)
    return [one for one in found if one.until >= since]


def acknowledge(
    backend: Backend, warning_id: str, reason: str | None, *, by: str, now: datetime | None = None
) -> SpendWarning | None:
    """Acknowledge a warning, or withdraw that (None); return it, None if it is not found now.

    One that is not found may be of a budget that only Dagster's definitions know. Raises InputError
    for a malformed id or an empty reason, ConfigError without a journal, and JournalError.
    """
    if not _WARNING_ID.fullmatch(warning_id):
        raise InputError(
            f"{warning_id!r} is not the id of a warning, which has ten characters, such as "
            "0f3a9c27d1; `krea-dagster spend` shows it"
        )
    if reason is not None and not reason.strip():
        raise InputError("the reason is empty; say why the warning is expected")
    if not backend.has_journal():
        raise ConfigError("there is no journal yet: nothing was spent")
    now = now or datetime.now(timezone.utc)
    found = recent_warnings(backend, now=now, days=None) or []
    warning = next((one for one in found if one.warning_id == warning_id), None)
    with backend.open_journal() as journal:
        known = journal.acknowledgements.current()
        if reason is None and warning_id not in known:
            raise InputError(f"the warning {warning_id} is not acknowledged")
        text = None if warning is None else warning.text
        journal.acknowledgements.add(warning_id, reason, by=by, text=text, at=now)
    return warning
