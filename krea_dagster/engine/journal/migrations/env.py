"""What Alembic runs: the revisions, on the connection and in the transaction it is given."""

from __future__ import annotations

from alembic import context

from krea_dagster.engine.journal import schema
from krea_dagster.engine.journal.migrations import version_table

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=schema.metadata,
    version_table=version_table.name,
    # SQLite can take the whole of it back, which Alembic does not assume.
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
