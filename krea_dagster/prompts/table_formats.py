"""Tables of Delta and Iceberg, read by their own libraries: deleted rows do not count."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final, Protocol

import pyarrow as pa

from krea_dagster import redact
from krea_dagster.errors import ConfigError, KreaError
from krea_dagster.file_systems import Options, kind_of, local_path, open_url, resolved
from krea_dagster.prompts.files import first_line
from krea_dagster.prompts.kinds import FORMATS, METADATA_ENDING, Kind, catalog_of

#: The library that reads a format, and the extra that brings it.
_LIBRARIES: Final = {Kind.DELTA: ("deltalake", "delta"), Kind.ICEBERG: ("pyiceberg", "iceberg")}

#: What fsspec calls the credentials of S3, and what deltalake calls them.
_S3_NAMES: Final = {
    "key": "aws_access_key_id",
    "secret": "aws_secret_access_key",
    "token": "aws_session_token",
    "endpoint_url": "aws_endpoint_url",
    "region_name": "aws_region",
}


class FormatTable(Protocol):
    """A table as it is in one version."""

    def mark(self) -> str:
        """Return what is the same only while the table's rows are."""

    def stream(self) -> pa.RecordBatchReader:
        """Return the rows of this version."""


class DeltaFormat:
    """A ``deltalake.DeltaTable``."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def mark(self) -> str:
        """Return the table's id and version."""
        return f"delta {self._table.metadata().id} {self._table.version()}"

    def stream(self) -> pa.RecordBatchReader:
        """Return the rows, without those of deletion vectors."""
        return pa.RecordBatchReader.from_stream(self._table.scan())


class IcebergFormat:
    """A ``pyiceberg.table.Table``."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def mark(self) -> str:
        """Return the table's id, snapshot and schema."""
        metadata = self._table.metadata
        return (
            f"iceberg {metadata.table_uuid} {metadata.current_snapshot_id} "
            f"{metadata.current_schema_id}"
        )

    def stream(self) -> pa.RecordBatchReader:
        """Return the rows, without those of delete files."""
        return self._table.scan().to_arrow_batch_reader()


def format_table(value: object) -> FormatTable | None:
    """Return a value that is a table of one of the libraries; None for any other."""
    name = f"{type(value).__module__.partition('.')[0]}.{type(value).__name__}"
    if name == "deltalake.DeltaTable":
        return DeltaFormat(value)
    if name in ("pyiceberg.Table", "pyiceberg.StaticTable"):
        return IcebergFormat(value)
    return None


def open_table(kind: Kind, place: str, shown: str, options: Options) -> FormatTable:
    """Return the newest version of a Delta table, or the current one of an Iceberg table.

    Args:
        kind: Delta or Iceberg.
        place: The table's folder; of Iceberg also a metadata file, or its place in a catalog.
        shown: What it is called in messages.
        options: How fsspec opens a URL.

    Raises:
        ConfigError: The extra is not installed, or nothing tells the version.
    """
    library, extra = _LIBRARIES[kind]
    try:
        import_module(library)
    except ImportError as error:
        raise ConfigError(
            f"{shown} is {FORMATS[kind]}, and {library} is not installed: "
            f"pip install 'krea-dagster[{extra}]'. Nothing was bought."
        ) from error
    try:
        return _delta(place, options) if kind is Kind.DELTA else _iceberg(place, shown, options)
    except KreaError:
        raise
    except Exception as error:  # noqa: BLE001 - each library and file system has errors of its own
        reason = redact.text(first_line(error), place)
        raise ConfigError(
            f"{shown} cannot be read as {FORMATS[kind]}: {reason}"
        ) from redact.safe_cause(error, place)


def _delta(place: str, options: Options) -> DeltaFormat:
    from deltalake import DeltaTable

    place = place if "://" in place else str(local_path(place))
    return DeltaFormat(DeltaTable(place, storage_options=_delta_options(place, options)))


def _iceberg(place: str, shown: str, options: Options) -> IcebergFormat:
    if (named := catalog_of(place)) is not None:
        from pyiceberg.catalog import load_catalog

        catalog, table = named
        return IcebergFormat(load_catalog(catalog).load_table(table))
    filesystem, root = open_url(place, options)
    # Where the table says its files are, in the words of its URL.
    at = place.rstrip("/") if "://" in place else root
    if not at.endswith(METADATA_ENDING):
        at = f"{at}/metadata/{_version(filesystem, root, shown)}{METADATA_ENDING}"
    return IcebergFormat(_static_table(at, filesystem))


def _version(filesystem: Any, root: str, shown: str) -> str:
    """Return the version that the hint of a table names.

    Nothing else tells it without a catalog: the newest file may be of a commit that failed.
    """
    hint = f"{root.rstrip('/')}/metadata/version-hint.text"
    if not filesystem.exists(hint):
        raise ConfigError(
            f"{shown} is an Iceberg table without a version hint: only its catalog knows which "
            "version is current. Give iceberg://CATALOG/NAMESPACE.TABLE, or the path of a metadata "
            "file"
        )
    version = str(filesystem.cat_file(hint), "utf-8").strip()
    return f"v{version}" if version.isdecimal() else version.removesuffix(METADATA_ENDING)


def _static_table(metadata: str, filesystem: Any) -> Any:
    from pyiceberg.catalog.noop import NoopCatalog
    from pyiceberg.io.fsspec import FsspecFileIO
    from pyiceberg.serializers import FromInputFile
    from pyiceberg.table import StaticTable

    class SameFileSystem(FsspecFileIO):
        """Opens all files as the table was opened, with its options."""

        def get_fs(self, scheme: str, hostname: str | None = None) -> Any:  # noqa: ARG002
            return filesystem

    files = SameFileSystem({})
    return StaticTable(
        identifier=("static-table", metadata),
        metadata_location=metadata,
        metadata=FromInputFile.table_metadata(files.new_input(metadata)),
        io=files,
        catalog=NoopCatalog("static-table"),
    )


def _delta_options(place: str, options: Options) -> dict[str, str]:
    """Return options in the names of deltalake; its own names are passed as they are."""
    given = resolved(options)
    given |= given.pop("client_kwargs", None) or {}
    if kind_of(place) != "s3":
        return {name: str(value) for name, value in given.items()}
    named = {_S3_NAMES.get(name, name): str(value) for name, value in given.items()}
    if named.get("aws_endpoint_url", "").startswith("http://"):
        named.setdefault("aws_allow_http", "true")
    return named
