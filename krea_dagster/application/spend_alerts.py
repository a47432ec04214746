"""The warnings in the spend tables, and alerts: warnings that a user's function posts once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date, datetime, timedelta, timezone
from typing import Final

from krea_dagster.application.backend import Backend
from krea_dagster.engine.budget import Budget
from krea_dagster.engine.journal.owners import new_owner
from krea_dagster.spend.proof.verify import account_proof
from krea_dagster.spend.tables.query import stored_tables
from krea_dagster.spend.warnings.budgets import hard_budgets
from krea_dagster.spend.warnings.load_history import observe
from krea_dagster.spend.warnings.warnings import SpendWarning, WarningKind, find_warnings

#: Days after its last day for which a warning is recent.
RECENT_DAYS: Final = 7


@dataclass
class PostedAlerts:
    """How many warnings were posted and are left, and the errors of those that failed.

    What is left without an error is being posted by another host.
    """

    posted: int = 0
    left: int = 0
    errors: list[Exception] = field(default_factory=list)


def recent_warnings(
    backend: Backend, budgets: Sequence[Budget] = (), *, now: datetime
) -> list[SpendWarning] | None:
    """Return the warnings of the last days in the spend tables; None without spend tables.

    ``budgets`` only warn, in addition to all of the settings. Raises ConfigError for a budget of an
    unknown column, and JournalError.
    """
    tables = stored_tables(backend.open_storage())
    if not tables.months:
        return None
    proof = None
    if backend.has_journal():
        with backend.open_journal() as journal:
            proof = account_proof(journal)
    every = [*hard_budgets(backend.caps()), *budgets, *backend.soft_budgets()]
    history = observe(tables, now=now, budgets=every, account=proof)
    since = now.astimezone(timezone.utc).date() - timedelta(days=RECENT_DAYS)
    return [one for one in find_warnings(history, now) if one.until >= since]


def post_alerts(
    backend: Backend,
    channel: str,
    found: Sequence[SpendWarning],
    post: Callable[[SpendWarning], object],
    *,
    at: datetime,
) -> PostedAlerts:
    """Post the warnings that were found ``at`` a time and are not posted yet, by a function.

    A warning for which the function raises an error waits for the next call. Several hosts may do
    this at the same time. Raises JournalError.
    """
    outcome = PostedAlerts()
    owner = new_owner(channel)
    with backend.open_journal() as journal:
        alerts = journal.alerts
        alerts.update(channel, {one.warning_id: _as_json(one) for one in found}, at=at)
        waiting = alerts.waiting(channel)
        if not waiting:
            return outcome
        journal.claims.register(owner)
        try:
            for warning_id in waiting:
                text = alerts.claim(channel, warning_id, owner.owner)
                if text is None:
                    continue
                try:
                    post(_from_json(text))
                except Exception as error:  # noqa: BLE001 - the function is the user's
                    outcome.errors.append(error)
                    alerts.end(channel, warning_id, posted_at=None)
                else:
                    outcome.posted += 1
                    alerts.end(channel, warning_id, posted_at=datetime.now(timezone.utc))
            outcome.left = len(alerts.waiting(channel))
        finally:
            journal.claims.release(owner.owner)
    return outcome


def _as_json(warning: SpendWarning) -> str:
    return json.dumps(asdict(warning), default=str)


def _from_json(text: str) -> SpendWarning:
    values = json.loads(text)
    days = {name: date.fromisoformat(values[name]) for name in ("since", "until")}
    return SpendWarning(**{**values, **days, "kind": WarningKind(values["kind"])})
