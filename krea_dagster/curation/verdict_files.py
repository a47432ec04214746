"""Verdicts as a file: CSV for people and spreadsheets, Parquet for programs.

A row says what one verdict says of one image. An empty ``verdict`` is a row that only has tags or a
note. The columns are the same in both forms; a CSV file has tags separated by semicolons, times in
UTC as ISO 8601, and a guard against formulas: a spreadsheet would compute a cell that begins with
``=``, ``+``, ``-`` or ``@``, so such a text gets an apostrophe in front, which a reader takes off.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from krea_dagster.csv_files import read_csv
from krea_dagster.engine.verdict import TAG_SEPARATORS, VERDICTS, Verdict
from krea_dagster.errors import InputError

_COLUMNS: Final[tuple[tuple[str, pa.DataType, str], ...]] = (
    ("image_sha256", pa.string(), "Hash of the image file's bytes, by which it is found"),
    ("prompt_id", pa.string(), "The row that the image was reviewed for"),
    ("sample", pa.int32(), "Which of the row's num_images this is, from 0"),
    ("request_key", pa.string(), "The image's purchase"),
    ("verdict", pa.string(), "keep, reject, flag, none (taken back); empty: only tags or a note"),
    ("reason", pa.string(), "Why it was rejected"),
    ("reviewer", pa.string(), "Who gave the verdict, or the tags and the note"),
    ("reviewed_at", pa.timestamp("us", tz="UTC"), "When"),
    ("tags", pa.list_(pa.string()), "Tags of the image"),
    ("note", pa.string(), "A note on the image"),
)

VERDICT_FILE_SCHEMA: Final = pa.schema([pa.field(name, kind) for name, kind, _ in _COLUMNS])
#: The description of each column.
VERDICT_FILE_DESCRIPTIONS: Final = {name: text for name, _, text in _COLUMNS}

#: Columns of which a row needs one, to say which image it is about.
KEYS: Final = ("image_sha256", "request_key", "prompt_id")

_FORMULA: Final = re.compile(r"'*[=+\-@\t\r]")
_GUARDED: Final = re.compile(r"'+[=+\-@\t\r]")
_TEXTS: Final = frozenset({"prompt_id", "reason", "reviewer", "tags", "note"})
_MOST_SAMPLE: Final = 2**31


@dataclass(frozen=True)
class VerdictRow:
    """One row of a file. None is what the file does not say; an empty ``verdict`` only annotates.

    ``place`` is where the row is, for messages. ``tags`` and ``note`` are None without a column of
    that name: then an import leaves them as they are.
    """

    place: str
    verdict: str
    image_sha256: str | None = None
    request_key: str | None = None
    prompt_id: str | None = None
    sample: int | None = None
    reason: str | None = None
    reviewer: str | None = None
    reviewed_at: datetime | None = None
    tags: tuple[str, ...] | None = None
    note: str | None = None


# -- writing --------------------------------------------------------------------------------------


def verdict_file(verdicts: Iterable[Verdict], form: str) -> bytes:
    """Return a file with a row for each verdict, in their order; ``form`` is csv or parquet."""
    rows = [_values(one) for one in verdicts]
    if form == "parquet":
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, VERDICT_FILE_SCHEMA), file)
        return file.getvalue()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(VERDICT_FILE_SCHEMA.names)
    writer.writerows([_cell(name, value) for name, value in row.items()] for row in rows)
    return text.getvalue().encode()


def _values(one: Verdict) -> dict[str, Any]:
    only_annotates = one.annotates
    return {
        "image_sha256": one.image_sha256,
        "prompt_id": one.prompt_id,
        "sample": one.sample,
        "request_key": one.request_key,
        "verdict": None if only_annotates else one.verdict,
        "reason": None if only_annotates else one.reason or None,
        "reviewer": one.reviewer,
        "reviewed_at": one.at,
        "tags": list(one.tags or ()),
        "note": one.note or None,
    }


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, datetime):
        return value.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    text = ";".join(value) if name == "tags" else str(value)
    return f"'{text}" if name in _TEXTS and _FORMULA.match(text) else text


# -- reading --------------------------------------------------------------------------------------


def form_of(path: Path) -> str:
    """Return csv or parquet, by the file's name. Raises InputError."""
    form = path.suffix.lower().removeprefix(".")
    if form not in ("csv", "parquet"):
        raise InputError(f"{path}: the name of a file of verdicts ends with .csv or .parquet")
    return form


def read_verdict_file(path: Path) -> tuple[list[VerdictRow], list[str]]:
    """Read the rows of a file, and a sentence on each row that is wrong.

    Raises InputError for a file that cannot be read, or has no column of ``KEYS``.
    """
    try:
        read = _parquet_rows if form_of(path) == "parquet" else _csv_rows
        names, rows = read(path)
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not set(names).intersection(KEYS):
        raise InputError(
            f"{path} says of no image: it needs a column {', '.join(KEYS[:-1])} or {KEYS[-1]}; "
            f"its columns are {', '.join(names) or 'none'}"
        )
    if not {"verdict", "tags", "note"}.intersection(names):
        raise InputError(f"{path} has no column verdict, tags or note")
    good: list[VerdictRow] = []
    wrong: list[str] = []
    for number, values in rows:
        place = f"{path.name} row {number}"
        try:
            good.append(_row(place, values))
        except InputError as error:
            wrong.append(f"{place}: {error}")
    return good, wrong


_Rows = Iterator[tuple[int, Mapping[str, Any]]]


def _parquet_rows(path: Path) -> tuple[Sequence[str], _Rows]:
    table = pq.read_table(path)
    return table.column_names, enumerate(table.to_pylist(), start=1)


def _csv_rows(path: Path) -> tuple[Sequence[str], _Rows]:
    names, rows = read_csv(path)

    def with_names(cells: Sequence[str]) -> Mapping[str, str]:
        return dict(zip_longest(names, map(_without_guard, cells[: len(names)]), fillvalue=""))

    return names, ((number, with_names(cells)) for number, cells in rows)


def _without_guard(text: str) -> str:
    return text[1:] if _GUARDED.match(text) else text


def _row(place: str, values: Mapping[str, Any]) -> VerdictRow:
    """Return the row of a file's values: texts of a CSV file, or of any type. Raises InputError."""
    texts = {name: _text(values.get(name)) for name in (*KEYS, "verdict", "reason", "reviewer")}
    verdict = (texts["verdict"] or "").strip().lower()
    if verdict and verdict not in VERDICTS:
        raise InputError(f"verdict is {verdict!r}; use one of {', '.join(VERDICTS)}")
    tags = _tags(values["tags"]) if "tags" in values else None
    note = _text(values["note"]) or "" if "note" in values else None
    if not verdict and not tags and not note:
        raise InputError(f"it has neither a verdict ({', '.join(VERDICTS)}) nor tags nor a note")
    if not any(texts[name] for name in KEYS):
        raise InputError(f"it names no image: {', '.join(KEYS)} are empty")
    return VerdictRow(
        place,
        verdict,
        image_sha256=(texts["image_sha256"] or "").strip().lower() or None,
        request_key=(texts["request_key"] or "").strip().lower() or None,
        prompt_id=texts["prompt_id"],
        sample=_sample(values.get("sample")),
        reason=texts["reason"] if verdict else None,
        reviewer=texts["reviewer"],
        reviewed_at=_time(values.get("reviewed_at")),
        tags=tags,
        note=note,
    )


def _text(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise InputError(f"{value!r} is not a text")
    return value


def _sample(value: Any) -> int | None:
    if value is None or str(value).strip() == "":
        return None
    text = str(value).strip().removesuffix(".0")
    if not text.isdecimal() or int(text) >= _MOST_SAMPLE:
        raise InputError(f"sample is {value!r}, which is not a whole number from 0")
    return int(text)


def _tags(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    parts = re.split(f"[{TAG_SEPARATORS}]", value) if isinstance(value, str) else value
    if not all(isinstance(one, str) for one in parts):
        raise InputError(f"tags is {value!r}, which is not a list of texts")
    return tuple(dict.fromkeys(tag for one in parts if (tag := " ".join(one.split()))))


def _time(value: Any) -> datetime | None:
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(re.sub("[zZ]$", "+00:00", value.strip()))
        except ValueError:
            raise InputError(
                f"reviewed_at is {value!r}; write it as 2026-11-20T09:30:00Z"
            ) from None
    if not isinstance(value, datetime):
        raise InputError(f"reviewed_at is {value!r}, which is not a time")
    # A time without a zone is in UTC, as every time of the package.
    return value.replace(tzinfo=value.tzinfo or timezone.utc).astimezone(timezone.utc)
