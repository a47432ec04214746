"""The earlier images: those of rows that were changed or removed, or replaced by later attempts."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.application.backend import Backend
from krea_dagster.arrow import as_array
from krea_dagster.curation.accepted.accepted_table import ACCEPTED_COLUMNS
from krea_dagster.curation.accepted.rules import verdict_table, verdicts_of
from krea_dagster.curation.export.spec import ExportSpec
from krea_dagster.engine.verdict import FLAG, REJECT
from krea_dagster.errors import ConfigError
from krea_dagster.manifest import earlier_images


def earlier_images_of(backend: Backend) -> pa.Table:
    """Return the earlier images as rows of a manifest; see ``manifest.earlier_images``.

    Raises ConfigError if there is no journal, and JournalError.
    """
    storage = backend.open_storage()
    if not backend.has_journal():
        raise ConfigError(
            f"{storage.shown('')} has no journal, which knows the images of earlier rows; set "
            "KREA_JOURNAL_URL to that of the runs"
        )
    with backend.open_journal() as journal:
        return earlier_images(storage, journal)


def earlier_to_export(backend: Backend, spec: ExportSpec) -> pa.Table:
    """Return the earlier images that an export takes, with their verdicts if it has accepted ones.

    These are all, or all that were neither rejected nor flagged. Raises ConfigError and
    JournalError.
    """
    table = earlier_images_of(backend)
    if spec.partitions is not None:
        wanted = pa.array(spec.partitions, pa.string())
        table = table.filter(pc.is_in(table["partition_key"], value_set=wanted))
    if spec.everything:
        return table
    with backend.open_journal() as journal:
        verdicts = verdict_table(journal.verdicts.current().values())
    found = verdicts_of(as_array(table["image_sha256"]), verdicts, list(ACCEPTED_COLUMNS))
    for name in ACCEPTED_COLUMNS:
        table = table.append_column(name, found[name])
    refused = pc.is_in(table["verdict"], value_set=pa.array([REJECT, FLAG]))
    return table.filter(pc.invert(refused))
