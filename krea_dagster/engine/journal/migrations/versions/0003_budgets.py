"""What budgets need: the scopes of each purchase, and the sums of months and partitions.

And an index, by which the spend tables find what has changed.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from datetime import datetime, timedelta, timezone

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_DAY_US = 86_400_000_000


def upgrade() -> None:
    """Add the column and the index, and add up what was bought before."""
    op.add_column("submissions", sa.Column("scopes", sa.Text(), nullable=True))
    op.create_index("ix_requests_updated_at", "requests", ["updated_at"], unique=False)
    found = op.get_bind().execute(
        sa.text(
            f"SELECT sent_at / {_DAY_US} AS day, partition_key, sum(committed_units), "  # noqa: S608 - a number
            f"sum(coalesce(charged_units, 0)) FROM submissions GROUP BY sent_at / {_DAY_US}, "
            "partition_key"
        )
    )
    committed: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    for day, partition_key, committed_units, spent_units in found:
        at = datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(days=int(day))
        for scope in (f"month:{at.year:04}-{at.month:02}", _fits(f"partition:{partition_key}")):
            committed[scope] += int(committed_units)
            spent[scope] += int(spent_units)
    if committed:
        names = ("scope", "committed_units", "spent_units")
        op.bulk_insert(
            sa.table("commitments", *map(sa.column, names)),
            [
                {"scope": scope, "committed_units": units, "spent_units": spent[scope]}
                for scope, units in sorted(committed.items())
            ],
        )


def _fits(scope: str) -> str:
    """A scope within the column's length."""
    if len(scope) <= 300:
        return scope
    return f"{scope[:200]}~{hashlib.sha256(scope.encode()).hexdigest()}"
