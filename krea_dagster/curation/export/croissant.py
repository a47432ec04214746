"""Croissant: what is in a version, in JSON-LD that search engines and ``mlcroissant`` read.

``croissant.json`` is next to the dataset card. It names the files and, except for tar shards, the
columns. Those of types that ``mlcroissant`` cannot read are left out: nested ones, bytes, decimals
and times of the day.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import quote

import pyarrow as pa

from krea_dagster.curation.export.card import title_of
from krea_dagster.curation.export.dataset_facts import DatasetFacts
from krea_dagster.curation.export.features import IMAGE
from krea_dagster.curation.export.folder import TABLES
from krea_dagster.curation.export.plan import ExportPlan
from krea_dagster.curation.export.spec import ExportSpec

_is = pa.types

#: The file's name below a version.
CROISSANT: Final = "croissant.json"
_STANDARD: Final = "http://mlcommons.org/croissant/1.0"
_RECORDS: Final = "images"
_FILES: Final = "image-files"
_TABLES: Final = "tables"
_SPLIT: Final = "split"

_MIME: Final = {
    "parquet": "application/x-parquet",
    "imagefolder": "application/x-parquet",
    "jsonl": "application/jsonlines",
    "csv": "text/csv",
    "webdataset": "application/x-tar",
}
_ENDINGS: Final = {"jpg": "image/jpeg"}
#: The formats of image files that mlcroissant 1.1 reads.
_READ: Final = frozenset({"png", "jpg"})
#: What mlcroissant calls the properties of a file: columns of these names would be mistaken.
_PROPERTIES: Final = frozenset(
    {"content", "filename", "filepath", "fullpath", "lines", "lineNumbers"}
)

#: Croissant's own words, which every document repeats in its context.
_TERMS: Final = (
    *("citeAs", "column", "equivalentProperty", "extract", "field", "fileProperty", "fileObject"),
    *("fileSet", "format", "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField"),
    *("path", "recordSet", "references", "regex", "repeated", "replace", "samplingRate"),
    *("separator", "source", "subField", "transform"),
)


def write_croissant(
    facts: DatasetFacts, spec: ExportSpec, plan: ExportPlan, *, version: str
) -> bytes:
    """Return the description of a version as JSON-LD."""
    made: dict[str, Any] = {
        "@context": _context(),
        "@type": "sc:Dataset",
        "conformsTo": _STANDARD,
        "name": title_of(facts, spec),
        "description": (
            f"{facts.images} generated images of {facts.prompts} prompts; README.md describes them."
        ),
        # The standard wants three numbers; what follows the plus sign is a build.
        "version": f"1.0.0+{version}",
        "keywords": ["synthetic", "text-to-image"],
        "isLiveDataset": False,
        **({} if spec.license is None else {"license": spec.license}),
        "distribution": _distribution(spec, plan),
    }
    if spec.form != "webdataset":
        fields = list(_fields(facts.columns, spec, plan))
        made["recordSet"] = [_node("cr:RecordSet", _RECORDS, field=fields)]
    return f"{json.dumps(made, indent=1, ensure_ascii=False)}\n".encode()


def _context() -> dict[str, Any]:
    return {
        "@language": "en",
        "@vocab": "https://schema.org/",
        "cr": "http://mlcommons.org/croissant/",
        "rai": "http://mlcommons.org/croissant/RAI/",
        "dct": "http://purl.org/dc/terms/",
        "sc": "https://schema.org/",
        "conformsTo": "dct:conformsTo",
        "data": {"@id": "cr:data", "@type": "@json"},
        "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
        "examples": {"@id": "cr:examples", "@type": "@json"},
        **{term: f"cr:{term}" for term in _TERMS},
    }


def _node(kind: str, identifier: str, **values: Any) -> dict[str, Any]:
    return {"@type": kind, "@id": identifier, "name": identifier, **values}


def _distribution(spec: ExportSpec, plan: ExportPlan) -> list[dict[str, Any]]:
    """Return the sets of files."""
    match spec.form:
        case "parquet" | "webdataset":
            ending = "parquet" if spec.form == "parquet" else "tar"
            tables = [f"data/*.{ending}"]
        case form:
            tables = [TABLES[form].format(split=one.name) for one in spec.splits]
    found = [_file_set(_TABLES, [_MIME[spec.form]], tables)]
    if spec.form in TABLES:
        kinds = [_ENDINGS.get(ending, f"image/{ending}") for ending in plan.endings]
        found.append(_file_set(_FILES, kinds, [f"*/*/*.{ending}" for ending in plan.endings]))
    return found


def _file_set(identifier: str, kinds: list[str], includes: list[str]) -> dict[str, Any]:
    return _node("cr:FileSet", identifier, encodingFormat=kinds, includes=includes)


# -- the columns -----------------------------------------------------------------------------


def _fields(columns: pa.Schema, spec: ExportSpec, plan: ExportPlan) -> Iterator[dict[str, Any]]:
    in_files = spec.form in TABLES and _READ.issuperset(plan.endings)
    if _SPLIT not in columns.names:
        yield _field(_SPLIT, "sc:Text", _split_source(spec, in_files=in_files))
    if spec.form == "parquet":
        source = {**_column(IMAGE), "transform": {"jsonPath": "bytes"}}
        yield _field(IMAGE, "sc:ImageObject", source)
    elif in_files:
        yield _field(IMAGE, "sc:ImageObject", _property(_FILES, "content"))
        yield _file_name(spec)
    else:
        yield _field("file_name", "sc:Text", _column("file_name"))
    for field in columns:
        kind, repeated = _type_of(field.type, spec)
        if kind is not None and field.name not in _PROPERTIES:
            found = _field(field.name, kind, _column(field.name))
            yield {**found, "repeated": True} if repeated else found


def _field(name: str, kind: str, source: Mapping[str, Any]) -> dict[str, Any]:
    identifier = f"{_RECORDS}/{quote(name, safe='')}"
    return {**_node("cr:Field", identifier, dataType=kind, source=source), "name": name}


def _column(name: str) -> dict[str, Any]:
    return {"fileSet": {"@id": _TABLES}, "extract": {"column": name}}


def _property(files: str, name: str, *, regex: str | None = None) -> dict[str, Any]:
    source = {"fileSet": {"@id": files}, "extract": {"fileProperty": name}}
    return source if regex is None else {**source, "transform": {"regex": regex}}


def _split_source(spec: ExportSpec, *, in_files: bool) -> dict[str, Any]:
    """Return how the split is read: from the name of a folder or file."""
    if in_files:
        return _property(_FILES, "filepath", regex=r"^.*/([^/]+)/[0-9]+/[^/]+$")
    if spec.form == "imagefolder":
        return _property(_TABLES, "filepath", regex=r"^.*/([^/]+)/[^/]+$")
    return _property(_TABLES, "filename", regex=r"^(.+?)(?:-[0-9]+)?\.[a-z]+$")


def _file_name(spec: ExportSpec) -> dict[str, Any]:
    """Return the path of an image file, by which it is joined with its row."""
    # A regular expression also makes text of the path, as the column has it.
    regex = r"^[^/]+/(.+)$" if spec.form == "imagefolder" else r"^(.+)$"
    found = _field("file_name", "sc:Text", _property(_FILES, "fullpath", regex=regex))
    return {**found, "references": {"fileSet": {"@id": _TABLES}, **_column("file_name")}}


def _type_of(kind: pa.DataType, spec: ExportSpec) -> tuple[str | None, bool]:
    """Return Croissant's type of a column, None for none, and whether it is a list."""
    if _is.is_list(kind) and spec.form != "csv":
        return _scalar(kind.value_type), True
    if _is.is_nested(kind) and spec.form == "csv":
        return "sc:Text", False  # as JSON
    return _scalar(kind), False


def _scalar(kind: pa.DataType) -> str | None:
    if any(matches(kind) for matches in _WITHOUT):
        return None
    return next((name for matches, name in _TYPES if matches(kind)), "sc:Text")


_WITHOUT: Final = (
    *(_is.is_nested, _is.is_binary, _is.is_large_binary, _is.is_decimal, _is.is_time),
)
_TYPES: Final = (
    (_is.is_boolean, "sc:Boolean"),
    (_is.is_integer, "sc:Integer"),
    (_is.is_floating, "sc:Float"),
    (_is.is_timestamp, "sc:DateTime"),
    (_is.is_date, "sc:Date"),
)
