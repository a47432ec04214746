"""The API key that read the account: that of the purchases of its run, where they have one."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"


def upgrade() -> None:
    """Make the column, and fill it."""
    op.add_column("account_readings", sa.Column("api_key", sa.String(length=16), nullable=True))
    connection = op.get_bind()
    of_runs = connection.execute(
        sa.text(
            "SELECT run_id, min(api_key) AS api_key FROM submissions WHERE api_key IS NOT NULL "
            "GROUP BY run_id HAVING min(api_key) = max(api_key)"
        )
    ).mappings()
    fill = sa.text("UPDATE account_readings SET api_key = :api_key WHERE run_id = :run_id")
    if rows := [dict(row) for row in of_runs]:
        connection.execute(fill, rows)
