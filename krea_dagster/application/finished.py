"""Partitions for which a run has nothing to do: it would buy nothing, and change no manifest."""

from __future__ import annotations

from collections.abc import Sequence

from krea_dagster.application.backend import Backend
from krea_dagster.application.batch import Batch
from krea_dagster.digests import Mask
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.manifest import has_manifest


def is_finished(
    backend: Backend,
    batch: Batch,
    journal: Journal,
    key: str,
    *,
    intact: Mask,
    folders: Sequence[str] = (),
) -> bool:
    """Return whether a partition's images are all intact, and its manifest as a run would write it.

    The column ``reused`` may differ: it tells what the run that wrote the manifest has bought.
    ``intact`` masks the images of the partition whose files are as they were stored. ``folders``
    are those of the manifests. Raises JournalError.
    """
    return bool(intact.all()) and has_manifest(
        backend.open_storage(),
        key,
        batch.manifest_schema,
        batch.manifest_parts(key, backend, journal, run_id=""),
        folders,
        rows=len(intact),
        ignored=["reused"],
    )
