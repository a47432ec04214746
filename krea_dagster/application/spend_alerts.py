"""Alerts: warnings in the spend tables that a user's function posts once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date, datetime, timezone

from krea_dagster.application.backend import Backend
from krea_dagster.engine.journal.owners import new_owner
from krea_dagster.spend.warnings.spend_warning import SpendWarning, WarningKind


@dataclass
class PostedAlerts:
    """How many warnings were posted and are left, and the errors of those that failed.

    What is left without an error is being posted by another host.
    """

    posted: int = 0
    left: int = 0
    errors: list[Exception] = field(default_factory=list)


def post_alerts(
    backend: Backend,
    channel: str,
    found: Sequence[SpendWarning],
    post: Callable[[SpendWarning], object],
    *,
    at: datetime,
) -> PostedAlerts:
    """Post the warnings that were found ``at`` a time and are not posted yet, by a function.

    Acknowledged ones are not posted. A warning for which the function raises an error waits for the
    next call. Several hosts may do this at the same time. Raises JournalError.
    """
    outcome = PostedAlerts()
    owner = new_owner(channel)
    with backend.open_journal() as journal:
        alerts = journal.alerts
        is_open = {one.warning_id: one.acknowledgement is None for one in found}
        texts = {one.warning_id: _as_json(one) for one in found if is_open[one.warning_id]}
        ended = [warning_id for warning_id, still in is_open.items() if not still]
        alerts.update(channel, texts, ended, at=at)
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
