"""Decide which partition a row belongs to, and what its key may look like.

Pure. A partition key is text that Dagster takes, that a person can type, and that
:func:`safe_name` turns into the name of a file.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Final
from urllib.parse import quote, unquote

from krea_dagster.errors import ConfigError

#: Most buckets of ``hash:N``.
MAX_BUCKETS: Final = 10_000

#: Longest partition key, in characters.
MAX_KEY: Final = 250

#: Longest name that :func:`safe_name` returns, in bytes. File systems take 255; the rest is
#: room for endings such as ``.parquet`` and those of temporary files.
MAX_NAME: Final = 200

_ALLOWED = "hash:N (N from 1 to 10000), column:NAME, or day:NAME"


@dataclass(frozen=True)
class HashPartitions:
    """``hash:N``: a row's bucket is drawn from its prompt_id. The keys are known in advance."""

    count: int

    def __str__(self) -> str:
        return f"hash:{self.count}"

    def keys(self) -> list[str]:
        """Return all keys, sorted: ``bucket-000`` …."""
        return [self._key(bucket) for bucket in range(self.count)]

    def key_for(self, prompt_id: str) -> str:
        """Return the key of the row with this prompt_id.

        By MD5, which only has to spread them evenly, and takes a quarter of SHA-256's time where a
        partition is looked for among millions of rows.
        """
        digest = hashlib.md5(prompt_id.encode(), usedforsecurity=False).digest()
        return self._key(int.from_bytes(digest[:4], "big") % self.count)

    def _key(self, bucket: int) -> str:
        width = max(3, len(str(self.count - 1)))
        return f"bucket-{bucket:0{width}d}"


@dataclass(frozen=True)
class ColumnPartitions:
    """``column:NAME``: a row's key is its value in that column, as text."""

    column: str

    def __str__(self) -> str:
        return f"column:{self.column}"


@dataclass(frozen=True)
class DayPartitions:
    """``day:NAME``: a row's key is the day, in UTC, of a date or a time in that column."""

    column: str

    def __str__(self) -> str:
        return f"day:{self.column}"


PartitionBy = HashPartitions | ColumnPartitions | DayPartitions


def parse_partition_by(text: str) -> PartitionBy:
    """Read a value of ``KREA_PARTITION_BY``: ``hash:N``, ``column:NAME`` or ``day:NAME``.

    Raises :class:`~krea_dagster.errors.ConfigError` for anything else.
    """
    kind, _, rest = text.strip().partition(":")
    if kind == "hash" and re.fullmatch(r"[0-9]{1,9}", rest) and 1 <= int(rest) <= MAX_BUCKETS:
        return HashPartitions(int(rest))
    if kind == "column" and rest:
        return ColumnPartitions(rest)
    if kind == "day" and rest:
        return DayPartitions(rest)
    raise ConfigError(f"KREA_PARTITION_BY is {text!r}; it must be {_ALLOWED}")


def key_problem(key: str) -> str | None:
    """Say what keeps a text from being a partition key, or None where nothing does.

    Dagster takes some of these and then reads them wrongly: "" is no partition to it, "..."
    stands for a range, "|" joins the parts of a multi-dimensional key.
    """
    if not key:
        return "must not be empty"
    if key != key.strip():
        return "must not begin or end with white space"
    if len(key) > MAX_KEY:
        return f"must be at most {MAX_KEY} characters long, not {len(key)}"
    if "..." in key:
        return "must not hold '...', which means a range to Dagster"
    if "|" in key:
        return "must not hold '|', which joins keys in Dagster"
    if any(unicodedata.category(character) in _UNPRINTABLE for character in key):
        return "must not hold line breaks or control characters"
    return None


# Control characters, line and paragraph separators, surrogates.
_UNPRINTABLE: Final = frozenset({"Cc", "Zl", "Zp", "Cs"})


def safe_name(key: str) -> str:
    """Return a name for a file or folder that stands for the key, on every file system.

    Percent-quoted; also a leading "." or "_", since readers of Parquet folders pass over such
    files, and so that "." and ".." are no directories. Two keys never share a name. A name
    over 200 bytes is cut, and ends in "@" and a hash of the whole key.
    """
    name = quote(key, safe="")
    if name.startswith((".", "_")):
        name = f"%{ord(name[0]):02X}{name[1:]}"
    if len(name) <= MAX_NAME:
        return name
    # quote() never leaves an "@", so that no short key can take the name of a long one.
    tail = f"@{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    return name[: MAX_NAME - len(tail)] + tail


def key_from_name(name: str) -> str | None:
    """Return the key that :func:`safe_name` was given, or None where the name was cut."""
    return None if "@" in name else unquote(name)


_ISO: Final = re.compile(
    r"(?P<day>\d{4}-\d\d-\d\d)"
    r"(?:[T ](?P<hour>\d\d):(?P<minute>\d\d)(?::(?P<second>\d\d)(?:[.,]\d+)?)?"
    r" ?(?:Z|z|(?P<sign>[+-])(?P<zone_hour>\d\d)(?::?(?P<zone_minute>\d\d))?)?)?",
    re.ASCII,
)


def day_of_text(text: str) -> str | None:
    """Return the UTC day, ``YYYY-MM-DD``, of an ISO date or time, or None where it is none.

    A time without a zone is taken as it stands.
    """
    match = _ISO.fullmatch(text)
    if match is None:
        return None
    try:
        day = date.fromisoformat(match["day"])
        if match["hour"] is None:
            return day.isoformat()
        hour, minute = int(match["hour"]), int(match["minute"])
        zone_hour, zone_minute = int(match["zone_hour"] or 0), int(match["zone_minute"] or 0)
        if hour > 23 or max(minute, int(match["second"] or 0), zone_minute) > 59 or zone_hour > 23:
            return None
        offset = 60 * zone_hour + zone_minute
        minutes = 60 * hour + minute - (-offset if match["sign"] == "-" else offset)
        return (day + timedelta(days=minutes // (24 * 60))).isoformat()
    except (ValueError, OverflowError):
        return None


def parse_day(key: str) -> date | None:
    """Return the day of a key ``YYYY-MM-DD``, or None where it is not one."""
    return date.fromisoformat(key) if day_of_text(key) == key else None
