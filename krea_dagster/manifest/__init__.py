"""The manifest: one row per requested image, made from the journal and the prompt table."""

from krea_dagster.manifest.build import (
    credits_charged,
    manifest_parts,
    manifest_schema,
    manifest_table,
)
from krea_dagster.manifest.earlier import earlier_rows
from krea_dagster.manifest.earlier_images import SUCCESSOR, earlier_images, present_rows
from krea_dagster.manifest.files import (
    has_manifest,
    manifest_name,
    manifest_names,
    manifest_partitions,
    manifest_paths,
    no_column,
    read_manifests,
    read_missing,
    table_name,
    table_names,
    write_manifest,
    write_manifest_parts,
)
from krea_dagster.manifest.grown import add_rows, locate_grown
from krea_dagster.manifest.locations import IMAGE_NAME
from krea_dagster.manifest.present import (
    Origin,
    accepted_requests,
    present_manifests,
    retire_manifests,
    rows_with_requests,
    without_files,
)
from krea_dagster.manifest.schema import DESCRIPTIONS, MANIFEST_SCHEMA
from krea_dagster.manifest.spool import Manifests

__all__ = [
    "DESCRIPTIONS",
    "IMAGE_NAME",
    "MANIFEST_SCHEMA",
    "SUCCESSOR",
    "Manifests",
    "Origin",
    "accepted_requests",
    "add_rows",
    "credits_charged",
    "earlier_images",
    "earlier_rows",
    "has_manifest",
    "locate_grown",
    "manifest_name",
    "manifest_names",
    "manifest_partitions",
    "manifest_parts",
    "manifest_paths",
    "manifest_schema",
    "manifest_table",
    "no_column",
    "present_manifests",
    "present_rows",
    "read_manifests",
    "read_missing",
    "retire_manifests",
    "rows_with_requests",
    "table_name",
    "table_names",
    "without_files",
    "write_manifest",
    "write_manifest_parts",
]
