"""API keys, as fingerprints: which purchases were made with which, and which are of one account."""

from __future__ import annotations

import hashlib
import hmac
from datetime import datetime, timezone

from sqlalchemy import Connection, select, update

from krea_dagster.engine.journal.database import Database
from krea_dagster.engine.journal.schema import about, api_keys, submissions
from krea_dagster.errors import ConfigError


class ApiKeyLog:
    """The fingerprints of API keys in a journal's database, never the keys.

    A fingerprint is told by the key and the journal together, so that it is worth nothing
    elsewhere. Its methods block. Raises JournalError wherever the database fails.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def fingerprint(self, api_key: str) -> str:
        """Return the fingerprint of a key in this journal."""
        with self._database.read("read") as connection:
            journal_id = connection.execute(select(about.c.journal_id)).scalar_one()
        return hmac.new(api_key.encode(), str(journal_id).encode(), hashlib.sha256).hexdigest()[:16]

    def enter(self, fingerprint: str) -> frozenset[str]:
        """Enter a key where it is new; returns the keys of its account, itself among them."""
        at = datetime.now(timezone.utc)

        def write(connection: Connection) -> None:
            row = {"fingerprint": fingerprint, "account": fingerprint, "first_at": at}
            new = self._database.insertion(api_keys).values(row)
            connection.execute(new.on_conflict_do_nothing())

        found = self._of_account(fingerprint)
        if not found:
            self._database.write("enter an API key in", write)
        return found or frozenset({fingerprint})

    def accept(self, fingerprint: str, same_as: str = "") -> int:
        """Declare a key to be of the account that the other purchases were made with.

        Returns how many purchases that concerns. ``same_as`` is the fingerprint of a key of that
        account. Raises ConfigError where it is needed, because there are several, or not known.
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
                    "say with --same-as which one is of this key's account. Nothing was changed."
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
        with self._database.read("read") as connection:
            rows = connection.execute(
                select(api_keys.c.fingerprint).where(api_keys.c.account == account)
            )
            return frozenset(rows.scalars())
