"""What a person acknowledges of the warnings about the spend."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from typing import Final

from krea_dagster.application.backend import Backend
from krea_dagster.application.spend import kept_columns, update_tables
from krea_dagster.application.spend_warnings import history_of
from krea_dagster.errors import ConfigError, InputError
from krea_dagster.spend.warnings.spend_warning import SpendWarning
from krea_dagster.spend.warnings.warnings import find_warnings

_WARNING_ID: Final = re.compile(r"[0-9a-f]{10}", re.ASCII)


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
    update_tables(backend, by=kept_columns(backend.open_storage()))
    found = find_warnings(history_of(backend, now=now), now, backend.settings.spend_threshold)
    warning = next((one for one in found if one.warning_id == warning_id), None)
    with backend.open_journal() as journal:
        known = journal.acknowledgements.current()
        if reason is None and warning_id not in known:
            raise InputError(f"the warning {warning_id} is not acknowledged")
        text = None if warning is None else warning.text
        journal.acknowledgements.add(warning_id, reason, by=by, text=text, at=now)
    return warning
