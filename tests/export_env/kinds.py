"""Columns of every kind that a prompt table may have, and how their values are compared."""

from __future__ import annotations

import base64
import json
import math
import uuid
from datetime import date, datetime, time, timezone
from decimal import Decimal
from typing import Any, Final
from zoneinfo import ZoneInfo

import pyarrow as pa

_BERLIN: Final = ZoneInfo("Europe/Berlin")
_AT: Final = datetime(2026, 3, 1, 12, 30, 15, 250_000, timezone.utc)

#: By name: the type, and the values of the first rows; the other rows repeat them.
KINDS: Final[dict[str, tuple[pa.DataType, list[Any]]]] = {
    "text_of_digits": (pa.string(), ["007", "8", None]),
    "text_of_words": (pa.string(), ["NA", "null", "None", "true", ""]),
    "text_of_lines": (pa.large_string(), ['a\nb,"c"\r\nd', "狐 🦊", None]),
    "only_null": (pa.null(), [None]),
    "whole": (pa.int64(), [2**53 + 1, -1, 0]),
    "whole_or_null": (pa.int64(), [2**53 + 1, None]),
    "small_or_null": (pa.int16(), [7, None]),
    "large_unsigned": (pa.uint64(), [2**64 - 1, 3, None]),
    "truth": (pa.bool_(), [True, False]),
    "truth_or_null": (pa.bool_(), [True, None, False]),
    "number": (pa.float64(), [0.1, float("nan"), None, -1e300]),
    "single": (pa.float32(), [0.5, None]),
    "money": (pa.decimal128(12, 2), [Decimal("1.50"), Decimal("-10.00"), None]),
    "raw": (pa.binary(), [b"\x00\xff", b"", None]),
    "raw_fixed": (pa.binary(4), [b"abcd", None]),
    "day": (pa.date32(), [date(2026, 3, 1), None]),
    "at": (pa.timestamp("us", tz="UTC"), [_AT, None]),
    "at_second": (pa.timestamp("s", tz="UTC"), [_AT.replace(microsecond=0), None]),
    "at_berlin": (pa.timestamp("ms", tz="Europe/Berlin"), [_AT.astimezone(_BERLIN), None]),
    "at_naive": (pa.timestamp("us"), [_AT.replace(tzinfo=None), None]),
    "clock": (pa.time64("us"), [time(23, 59, 59, 5), None]),
    "unique": (pa.uuid(), [uuid.UUID(int=5).bytes, None]),
    "document": (pa.json_(pa.string()), ['{"a": [1, null]}', None]),
    "category_code": (pa.dictionary(pa.int8(), pa.string()), ["sea", "land", None]),
    "lists": (pa.list_(pa.int32()), [[1, 2], [], None, [None]]),
    "texts": (pa.large_list(pa.string()), [["a", None], None]),
    "pair": (pa.list_(pa.float32(), 2), [[0.5, 1.5], None]),
    "record": (
        pa.struct([("lens", pa.string()), ("iso", pa.int32()), ("tags", pa.list_(pa.string()))]),
        [
            {"lens": "50", "iso": 100, "tags": ["x"]},
            {"lens": None, "iso": None, "tags": None},
            None,
        ],
    ),
    "records": (
        pa.list_(pa.struct([("name", pa.string()), ("share", pa.float64())])),
        [[{"name": "a", "share": 0.5}, {"name": "b", "share": None}], [], None],
    ),
    "mapping": (pa.map_(pa.string(), pa.int64()), [[("a", 1), ("b", None)], [], None]),
    "deep": (
        pa.struct([("by", pa.map_(pa.string(), pa.list_(pa.decimal128(4, 1))))]),
        [{"by": [("x", [Decimal("1.5")])]}, None],
    ),
}


def column(name: str, rows: int) -> pa.Array:
    """Return a column of this kind."""
    kind, values = KINDS[name]
    storage = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    if pa.types.is_dictionary(kind):
        return pa.array([values[at % len(values)] for at in range(rows)]).dictionary_encode()
    array = pa.array([values[at % len(values)] for at in range(rows)], storage)
    return pa.ExtensionArray.from_storage(kind, array) if storage is not kind else array


def expected(name: str, row: int) -> Any:
    """Return what a reader must find in a row: maps are lists of key and value."""
    _, values = KINDS[name]
    value = values[row % len(values)]
    if value is None:
        return None
    if name == "unique":
        return str(uuid.UUID(bytes=value))
    if name == "mapping":
        return [{"key": key, "value": number} for key, number in value]
    if name == "deep":
        return {"by": [{"key": key, "value": one} for key, one in value["by"]]}
    return value


def same(wanted: Any, got: Any, *, csv: bool) -> bool:
    """Return whether a value that was read is the one that was written.

    A form without a type has its text: times as ISO 8601, bytes as base64, decimals and large
    numbers as digits, in CSV also lists and records as JSON, and an empty text is null.
    """
    if csv and isinstance(wanted, str | bytes) and not wanted:
        return got in (None, "")
    if csv and isinstance(wanted, dict | list) and isinstance(got, str):
        got = json.loads(got)
    if isinstance(wanted, dict):
        return wanted.keys() == got.keys() and all(
            same(one, got[key], csv=False) for key, one in wanted.items()
        )
    if isinstance(wanted, list):
        pairs = zip(wanted, got, strict=True)
        return len(wanted) == len(got) and all(same(one, two, csv=False) for one, two in pairs)
    if wanted is None or (isinstance(wanted, float) and not math.isfinite(wanted)):
        return got is None or (csv and got == "")
    return _same_value(wanted, got, csv=csv)


def _same_value(wanted: Any, got: Any, *, csv: bool) -> bool:
    match wanted:
        case bytes():
            return bool(got == base64.b64encode(wanted).decode())
        case datetime():
            return datetime.fromisoformat(str(got).replace("Z", "+00:00")) == wanted
        case date() | time():
            return bool(got == wanted.isoformat())
        case Decimal():
            return bool(got == f"{wanted:f}")
        case bool():
            return got is wanted or (csv and got == str(wanted).lower())
        case float():
            return float(got) == wanted
        case int():
            return isinstance(got, int | str | float) and (got == wanted or str(got) == str(wanted))
    return bool(got == wanted)
