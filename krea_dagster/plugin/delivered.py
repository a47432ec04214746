"""Partitions of which Dagster shows all images as delivered, and nothing as out of date."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import dagster as dg

from krea_dagster.engine.states import State
from krea_dagster.plugin.metadata import krea_entry
from krea_dagster.plugin.names import MANIFEST_ASSET, Names

#: Maximum number of events in a query.
_MOST_EVENTS: Final = 500


def delivered_partitions(instance: dg.DagsterInstance, names: Names) -> frozenset[str]:
    """Return the partitions whose last materializations need no other.

    ``image_manifest`` was made after ``images`` and ``prompt_columns``, and ``images`` after
    ``prompts`` and with an image for each row.
    """
    prompts, columns, images, manifests = (
        instance.get_latest_storage_id_by_partition(
            names.key(name), dg.DagsterEventType.ASSET_MATERIALIZATION
        )
        for name in ("prompts", "prompt_columns", "images", MANIFEST_ASSET)
    )
    newest = {
        images[key]: key
        for key, at in manifests.items()
        if at > columns.get(key, 0) and at > images.get(key, at) > prompts.get(key, 0)
    }
    return frozenset(newest[at] for at in _delivered(instance, names.key("images"), sorted(newest)))


def _delivered(
    instance: dg.DagsterInstance, key: dg.AssetKey, numbers: Sequence[int]
) -> Iterator[int]:
    """Yield which of these materializations, by their numbers, say that no image is missing."""
    for start in range(0, len(numbers), _MOST_EVENTS):
        some = numbers[start : start + _MOST_EVENTS]
        records = dg.AssetRecordsFilter(asset_key=key, storage_ids=some)
        for record in instance.fetch_materializations(records, limit=len(some)).records:
            made = record.asset_materialization
            if made is not None and _is_delivered(made.metadata):
                yield record.storage_id


def _is_delivered(metadata: Mapping[str, dg.MetadataValue[Any]]) -> bool:
    rows = krea_entry(metadata, "rows")
    stored = krea_entry(metadata, f"rows_{State.STORED.value}") or dg.MetadataValue.int(0)
    return rows is not None and rows.value == stored.value
