"""API keys as fingerprints: which of them belong to one account."""

from __future__ import annotations

import hashlib
import hmac
from datetime import datetime, timezone

from sqlalchemy import Connection, select, update

from krea_dagster.engine.journal.database import DatabaseLog
from krea_dagster.engine.journal.schema import api_keys, submissions
from krea_dagster.engine.journal.sql import insertion
from krea_dagster.errors import ConfigError


class ApiKeyLog(DatabaseLog):
    """The fingerprints of API keys in a journal's database, never the keys.

    A fingerprint depends on the key and the journal, so that it is useless elsewhere.
    """

    def fingerprint(self, api_key: str) -> str:
        """Return the fingerprint of a key in this journal."""
        journal_id = self._database.journal_id.encode()
        return hmac.new(api_key.encode(), journal_id, hashlib.sha256).hexdigest()[:16]

    def enter(self, fingerprint: str) -> frozenset[str]:
        """Enter a key if it is new, and return the keys of its account, including itself."""
        at = datetime.now(timezone.utc)

        def write(connection: Connection) -> None:
            row = {"fingerprint": fingerprint, "account": fingerprint, "first_at": at}
            new = insertion(connection, api_keys).values(row)
            connection.execute(new.on_conflict_do_nothing())

        found = self._of_account(fingerprint)
        if not found:
            self._database.write("enter an API key in", write)
        return found or frozenset({fingerprint})

    def accept(self, fingerprint: str, same_as: str = "") -> int:
        """Declare that a key belongs to the account of the other purchases; return their number.

        ``same_as`` is the fingerprint of a key of that account. Raises ConfigError if there are
        several accounts and it is missing, or if it is unknown.
        """
        self.enter(fingerprint)

        def write(connection: Connection) -> int:
            used = set(
                connection.execute(
                    select(submissions.c.api_key)
                    .where(submissions.c.api_key.is_not(None))
                    .where(submissions.c.api_key != fingerprint)
                    .distinct()
                ).scalars()
            )
            known = sorted(used)
            if same_as:
                used &= {same_as}
            accounts = set(
                connection.execute(
                    select(api_keys.c.account).where(api_keys.c.fingerprint.in_(used))
                ).scalars()
            )
            if len(accounts) > 1 or (same_as and not used):
                raise ConfigError(
                    f"the journal {self._database.where} holds purchases with keys of "
                    f"several accounts, with the fingerprints {', '.join(known)}: "
                    "name a key of this key's account with --same-as. Nothing was changed."
                )
            for account in accounts:
                connection.execute(
                    update(api_keys)
                    .where(api_keys.c.fingerprint == fingerprint)
                    .values(account=account)
                )
            counted = connection.execute(
                select(submissions.c.idempotency_key).where(submissions.c.api_key.in_(used))
            )
            return len(counted.all())

        return self._database.write("accept an API key in", write)

    def _of_account(self, fingerprint: str) -> frozenset[str]:
        account = (
            select(api_keys.c.account)
            .where(api_keys.c.fingerprint == fingerprint)
            .scalar_subquery()
        )
        rows = self._database.fetch(
            select(api_keys.c.fingerprint).where(api_keys.c.account == account)
        )
        return frozenset(row.fingerprint for row in rows)
