"""Run the revisions on a given connection, in its transaction: what Alembic executes."""

from __future__ import annotations

from alembic import context

from krea_dagster.engine.journal import schema
from krea_dagster.engine.journal.migrations import version_table

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=schema.metadata,
    version_table=version_table.name,
    # SQLite can roll it back, which Alembic does not assume.
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
