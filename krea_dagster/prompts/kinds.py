"""What a path or URL of a prompt table is: decided by content and ending, or refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Enum, auto
from typing import Any, Final

from pyarrow import fs

from krea_dagster.errors import ConfigError


class Kind(Enum):
    """How a source is read."""

    PARQUET = auto()
    CSV = auto()
    JSONL = auto()
    DELTA = auto()
    ICEBERG = auto()


PARQUET_ENDINGS: Final = (".parquet", ".pq")
_TEXT_ENDINGS: Final = {".csv": Kind.CSV, ".jsonl": Kind.JSONL, ".ndjson": Kind.JSONL}
METADATA_ENDING: Final = ".metadata.json"

#: Of a URL that names a database, before any "+driver".
_DATABASES: Final = frozenset(
    {
        "bigquery", "clickhouse", "databricks", "duckdb", "mariadb", "mssql", "mysql", "oracle",
        "postgres", "postgresql", "redshift", "snowflake", "sqlite", "trino",
    }
)  # fmt: skip

_GZIP: Final = "compressed with gzip"
_ARRAY: Final = "a JSON array"
_JSON: Final = "JSON"
_TEXT: Final = "text"
#: What a file of these kinds may look like.
_BEGINNINGS: Final = {Kind.CSV: {_TEXT, _JSON, _ARRAY}, Kind.JSONL: {_TEXT, _JSON}}

_IN_PYTHON: Final = "read it in a function, which may be the prompt table"
#: How other files begin, what they are, and what to do.
_OTHERS: Final = (
    (rb"\x80[\x02-\x05]", "a Python pickle", "store the table as Parquet"),
    (rb"PK\x03\x04", "an Excel workbook or a zip archive", "save the table as CSV"),
    (rb"\xd0\xcf\x11\xe0", "an Excel workbook", "save the table as CSV"),
    (rb"ARROW1", "an Arrow IPC (Feather) file", _IN_PYTHON),
    (rb"ORC", "an ORC file", _IN_PYTHON),
    (rb"Obj\x01", "an Avro file", _IN_PYTHON),
    (rb"SQLite format 3\0", "an SQLite database", _IN_PYTHON),
    (rb".{8}DUCK", "a DuckDB database", _IN_PYTHON),
    (rb"\x1f\x8b", _GZIP, "its name must end in .csv.gz or .jsonl.gz"),
    (rb"\xff\xfe|\xfe\xff", "text in UTF-16", "save it as CSV in UTF-8"),
    (rb"(\xef\xbb\xbf)?\s*\[", _ARRAY, "write one object per line, as .jsonl"),
    (rb"(\xef\xbb\xbf)?\s*\{", _JSON, "name it .jsonl if each line is an object"),
    (rb"[^\0-\x08\x0e-\x1f]+\Z", _TEXT, "its name must end in .csv or .jsonl"),
)
#: The table formats, and the folders that show the first one and another.
FORMATS: Final = {Kind.DELTA: "a Delta table", Kind.ICEBERG: "an Iceberg table"}
_MARKERS: Final = {"_delta_log": FORMATS[Kind.DELTA], ".hoodie": "a Hudi table"}
_HEAD_BYTES: Final = 512
_PARQUET: Final = (b"PAR1", b"PARE")


def kind_of(filesystem: Any, root: str, shown: str) -> Kind:
    """Return the kind of a source. What does not exist is left to the Parquet reader.

    Raises ConfigError for other content, which it names.
    """
    info = filesystem.get_file_info(root)
    if info.type == fs.FileType.Directory:
        return _kind_of_folder(filesystem, root)
    name = root.lower()
    if info.type != fs.FileType.File or name.endswith(PARQUET_ENDINGS):
        return Kind.PARQUET
    if name.endswith(METADATA_ENDING):
        return Kind.ICEBERG
    head = _head(filesystem, root)
    if head[:4] in _PARQUET:
        return Kind.PARQUET
    kind = _kind_of_text(name)
    if kind is not None and _begins_as(kind, head, is_packed=name.endswith(".gz")):
        return kind
    raise ConfigError(f"{shown} is {describe(head) or 'not a file of a known kind'}")


def kind_by_name(place: str) -> Kind:
    """Return what a path or URL seems to be, without a look at it."""
    if catalog_of(place) or place.endswith(METADATA_ENDING):
        return Kind.ICEBERG
    return _kind_of_text(place) or Kind.PARQUET


def _kind_of_text(name: str) -> Kind | None:
    ending = re.search(r"\.[a-z]+\Z", name.lower().removesuffix(".gz"))
    return _TEXT_ENDINGS.get(ending.group() if ending else "")


def describe(head: bytes) -> str:
    """Return what another file is, by how it begins; empty if that is unknown."""
    name, advice = _content(head)
    return f"{name}: {advice}" if name else ""


def describe_file(filesystem: Any, path: str) -> str:
    """Return the same for a file that could not be read as Parquet."""
    try:
        return describe(_head(filesystem, path))
    except Exception:  # noqa: BLE001 - each file system has errors of its own; another is shown
        return ""


def table_within(names: Iterable[str]) -> tuple[str, str] | None:
    """Return a table of a table format among the files of a folder: its folder, and what it is.

    Its data files alone are not the table: some hold rows that were deleted.
    """
    for name in names:
        parts = name.split("/")
        for at, part in enumerate(parts):
            kind = _MARKERS.get(part)
            if part == "metadata" and METADATA_ENDING in name and at == len(parts) - 2:
                kind = FORMATS[Kind.ICEBERG]
            if kind is not None:
                return "/".join(parts[:at]), kind
    return None


def table_around(filesystem: Any, root: str) -> tuple[str, str] | None:
    """Return the table whose data a file or folder is: its folder, and what it is."""
    folder = root.rstrip("/").rpartition("/")[0]
    while folder:
        try:
            kind = _kind_of_folder(filesystem, folder)
        except Exception:  # noqa: BLE001 - who may read one file may not list what is around it
            return None
        if kind is not Kind.PARQUET:
            return folder, FORMATS[kind]
        folder, _, name = folder.rpartition("/")
        if not ("=" in name or name == "data"):
            return None
    return None


def catalog_of(source: str) -> tuple[str, str] | None:
    """Return the catalog and the table of ``iceberg://catalog/namespace.table``, else None."""
    found = re.fullmatch(r"iceberg://([^/]+)/([^/]+\.[^/]+)", source)
    return (found[1], found[2]) if found else None


def database_of(source: str) -> str:
    """Return the database that a URL names, such as ``postgresql``; empty for other sources."""
    name = source.partition("://")[0].partition("+")[0].lower() if "://" in source else ""
    return name if name in _DATABASES else ""


def _kind_of_folder(filesystem: Any, root: str) -> Kind:
    base = root.rstrip("/")
    log, metadata = filesystem.get_file_info([f"{base}/_delta_log", f"{base}/metadata"])
    if log.type == fs.FileType.Directory:
        return Kind.DELTA
    if metadata.type == fs.FileType.Directory:
        found = filesystem.get_file_info(fs.FileSelector(metadata.path))
        if any(METADATA_ENDING in one.path for one in found):
            return Kind.ICEBERG
    return Kind.PARQUET


def _head(filesystem: Any, path: str) -> bytes:
    with filesystem.open_input_stream(path, compression=None) as file:
        head: bytes = file.read(_HEAD_BYTES)
    return head


def _content(head: bytes) -> tuple[str, str]:
    """Return what begins so, and what to do; empty texts if that is unknown."""
    for pattern, name, advice in () if head[:4] in _PARQUET else _OTHERS:
        if re.match(pattern, head, re.DOTALL):
            return name, advice
    return "", ""


def _begins_as(kind: Kind, head: bytes, *, is_packed: bool) -> bool:
    """Return whether a file begins as its ending says."""
    name = _content(head)[0]
    if is_packed:
        return name == _GZIP
    return not head or name in _BEGINNINGS[kind]
