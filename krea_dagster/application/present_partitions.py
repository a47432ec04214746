"""The partitions of a prompt table as it is now, and no manifest of any other."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone

from krea_dagster.application.backend import Backend
from krea_dagster.manifest import (
    Origin,
    locate_grown,
    manifest_name,
    manifest_names,
    retire_manifests,
)
from krea_dagster.prompts import PromptTable


def origin_of(backend: Backend, table: PromptTable) -> Origin:
    """Return what the manifests of a table are made from. Raises JournalError."""
    with backend.open_journal() as journal:
        return Origin(backend.table_id(journal, table), str(table.partition_by))


def retire_departed(
    backend: Backend, table: PromptTable, folders: Sequence[str] = (), written: Sequence[str] = ()
) -> None:
    """Move manifests to ``earlier/`` whose partition the table does not have now.

    Those of ``generate`` calls get the present paths of their files.

    ``written`` are the partitions whose manifests this run writes. If the table cannot be read, it
    raises ConfigError or PromptTableError, and no manifest is moved.
    """
    storage = backend.open_storage()
    own = {manifest_name(key, folders) for key in written}
    names = list(manifest_names(storage, folders))
    if own.issuperset(names):
        return
    locate_grown(storage, manifest_names(storage) if folders else names)
    read_at = datetime.now(timezone.utc)
    present = table.partition_keys()
    origin = origin_of(backend, table)
    retire_manifests(
        storage, folders, origin, present, names=names, written=written, read_at=read_at
    )
