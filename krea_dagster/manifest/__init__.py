"""The manifest: one row per image that was asked for, made from the journal and the table."""

from krea_dagster.manifest.build import credits_charged, manifest_table
from krea_dagster.manifest.files import manifest_name, read_manifests, write_manifest
from krea_dagster.manifest.schema import DESCRIPTIONS, MANIFEST_SCHEMA

__all__ = [
    "DESCRIPTIONS",
    "MANIFEST_SCHEMA",
    "credits_charged",
    "manifest_name",
    "manifest_table",
    "read_manifests",
    "write_manifest",
]
