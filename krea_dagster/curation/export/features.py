"""How the ``datasets`` library is told the types of columns, so that it does not guess them.

It guesses from the first rows of each split: a split whose reviewers are all null, or text that
looks like a number, would be read as another type than the rest. Parquet files tell it in their
schema; for the other forms the dataset card does.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any, Final

import pyarrow as pa

from krea_dagster.curation.export.spec import Form

_is = pa.types

#: Arrow's type names that differ in ``datasets``.
_NAMES: Final = {"double": "float64", "float": "float32", "halffloat": "float16"}

#: The name of the image's column in ``datasets``.
IMAGE: Final = "image"


def parquet_metadata(schema: pa.Schema) -> dict[str, str]:
    """Return the metadata of a Parquet schema whose column ``image`` has the images."""
    features = {
        field.name: {"_type": "Image"} if field.name == IMAGE else _in_schema(field.type)
        for field in schema
    }
    return {"huggingface": json.dumps({"info": {"features": features}})}


def card_entries(
    form: Form, schema: pa.Schema, with_nulls: Collection[str], endings: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the card's header says of the columns: in the config, and in ``dataset_info``.

    ``schema`` has the exported columns, ``with_nulls`` names those that have a null somewhere, and
    ``endings`` are those of the image files.
    """
    if form == "csv":
        columns = [
            _named(field.name, {"dtype": _in_csv(field.type, field.name in with_nulls)})
            for field in schema
        ]
        # Without these, the texts "NA" and "null" would be read as nulls.
        texts = {"keep_default_na": False, "na_values": [""]}
        return {"features": [*_FILE, *columns], **texts}, {}
    if form == "jsonl":
        columns = [_named(field.name, _in_json(field.type)) for field in schema]
        return {"features": [*_FILE, *columns]}, {}
    if form == "webdataset":
        # Its row is parsed by json, which leaves times as text.
        row = [_named(field.name, _in_json(field.type, times=False)) for field in schema]
        images = [_named(ending, {"dtype": IMAGE}) for ending in endings]
        keys = [_named(name, {"dtype": "string"}) for name in ("__key__", "__url__", "txt")]
        return {}, {"features": [*keys, *images, {"name": "json", "struct": row}]}
    return {}, {}  # the schema of the Parquet files has them


_FILE: Final = ({"name": "file_name", "dtype": "string"},)


def _named(name: str, feature: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, **feature}


def _name(kind: pa.DataType) -> str:
    name = str(kind)
    return name.partition("[")[0] if _is.is_date(kind) else _NAMES.get(name, name)


def _in_schema(kind: pa.DataType) -> Any:
    """Return a type in the form of a Parquet schema's metadata."""
    if _is.is_list(kind):
        return [_in_schema(kind.value_type)]
    if _is.is_struct(kind):
        return {field.name: _in_schema(field.type) for field in kind}
    return {"dtype": _name(kind), "_type": "Value"}


def _in_json(kind: pa.DataType, *, times: bool = True) -> dict[str, Any]:
    """Return the type of a JSON value in the form of the card."""
    if _is.is_list(kind):
        inner = _in_json(kind.value_type, times=times)
        return {"list": inner.get("dtype") or inner.get("struct") or inner}
    if _is.is_struct(kind):
        fields = [_named(field.name, _in_json(field.type, times=times)) for field in kind]
        return {"struct": fields}
    if _is_number(kind) or _is.is_boolean(kind) or (times and _is_time(kind)):
        return {"dtype": _name(kind)}
    return {"dtype": "string"}


def _is_number(kind: pa.DataType) -> bool:
    return bool(_is.is_integer(kind) or _is.is_floating(kind))


def _is_time(kind: pa.DataType) -> bool:
    """Whether the reader of JSON lines takes the text for a time."""
    return bool(_is.is_timestamp(kind) or _is.is_date32(kind))


def _in_csv(kind: pa.DataType, has_nulls: bool) -> str:
    """Return the type of a cell. pandas, which reads it, has no integer or boolean null."""
    if _is.is_floating(kind):
        return _name(kind)
    if not has_nulls and (_is_number(kind) or _is.is_boolean(kind)):
        return _name(kind)
    if _is_number(kind) and kind.bit_width <= 32:
        return "float64"
    return "string"
