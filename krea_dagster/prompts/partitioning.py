"""Decide which partition a row belongs to, and what its key may look like.

Pure. A partition key is text that Dagster takes, that a person can type, and that
:func:`safe_name` turns into the name of a file.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from calendar import monthrange
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from functools import cached_property
from typing import ClassVar, Final, Literal, get_args
from urllib.parse import quote, unquote
from zoneinfo import ZoneInfo, available_timezones

from krea_dagster.errors import ConfigError
from krea_dagster.prompts.murmur import hash_of_text

#: Most buckets of ``hash:N``.
MAX_BUCKETS: Final = 10_000

#: Longest partition key, in characters.
MAX_KEY: Final = 250

#: Longest name that :func:`safe_name` returns, in bytes. File systems take 255; the rest is
#: room for endings such as ``.parquet`` and those of temporary files.
MAX_NAME: Final = 200

Unit = Literal["day", "week", "month"]

_UNITS: Final[tuple[Unit, ...]] = get_args(Unit)
_ALLOWED: Final = (
    "hash:N (N from 1 to 10000), column:NAME, day:NAME, week:NAME, month:NAME, one of these three "
    "with a time zone as in day:NAME@Europe/Berlin, or with a column as in day:NAME,column:NAME"
)


@dataclass(frozen=True)
class HashPartitions:
    """``hash:N``: a row's bucket is drawn from its prompt_id. The keys are known in advance."""

    count: int

    def __str__(self) -> str:
        return f"hash:{self.count}"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the table that decide the partition: none but prompt_id."""
        return ()

    def has_key(self, key: str) -> bool:
        """Whether a partition can have this key."""
        return key in self._keys

    def keys(self) -> list[str]:
        """Return all keys, sorted: ``bucket-000`` …."""
        return [self._key(bucket) for bucket in range(self.count)]

    def key_for(self, prompt_id: str) -> str:
        """Return the key of the row with this prompt_id.

        By the upper half of MurmurHash64A, which only has to spread them evenly, and takes a
        fraction of a cryptographic hash's time where a partition is looked for among millions.
        """
        return self._key((hash_of_text(prompt_id) >> 32) % self.count)

    def _key(self, bucket: int) -> str:
        width = max(3, len(str(self.count - 1)))
        return f"bucket-{bucket:0{width}d}"

    @cached_property
    def _keys(self) -> frozenset[str]:
        return frozenset(self.keys())


@dataclass(frozen=True)
class ColumnPartitions:
    """``column:NAME``: a row's key is its value in that column, as text."""

    column: str

    def __str__(self) -> str:
        return f"column:{self.column}"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the table that decide the partition."""
        return (self.column,)

    def has_key(self, key: str) -> bool:
        """Whether a partition can have this key."""
        return key_problem(key) is None


@dataclass(frozen=True)
class TimePartitions:
    """``day:NAME``, ``week:NAME`` or ``month:NAME``: a row's key is when a time in it falls.

    The key is the first day of the unit, ``YYYY-MM-DD``: weeks begin on Mondays. A time with a
    zone is taken to ``zone``; one without stands for itself.
    """

    unit: Unit
    column: str
    zone: str = "UTC"

    def __str__(self) -> str:
        zone = "" if self.zone == "UTC" else f"@{self.zone}"
        return f"{self.unit}:{self.column}{zone}"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the table that decide the partition."""
        return (self.column,)

    def key_of(self, day: date) -> str:
        """Return the key of a day."""
        return self._first(day).isoformat()

    def has_key(self, key: str) -> bool:
        """Whether a partition can have this key: the first day of a unit."""
        day = parse_day(key)
        return day is not None and self._first(day) == day

    def last_day(self, key: str) -> date:
        """Return the last day of the partition with this key."""
        first = date.fromisoformat(key)
        if self.unit == "day":
            return first
        if self.unit == "week":
            return first + min(timedelta(days=6), date.max - first)
        return first.replace(day=monthrange(first.year, first.month)[1])

    def _first(self, day: date) -> date:
        if self.unit == "day":
            return day
        if self.unit == "week":
            # The first week of year 1 begins on a Monday, so that none begins before time does.
            return day - timedelta(days=day.weekday())
        return day.replace(day=1)


@dataclass(frozen=True)
class MultiPartitions:
    """``day:NAME,column:NAME``: a row's key joins the value of a column and a time.

    As Dagster writes it, with the dimensions in the order of their names, which are ``column``
    and the unit: ``flux|2026-11-02``.
    """

    #: Stands between the parts of a key.
    BAR: ClassVar[str] = "|"

    time: TimePartitions
    by_column: ColumnPartitions

    def __str__(self) -> str:
        return f"{self.time},{self.by_column}"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the table that decide the partition."""
        return (self.by_column.column, self.time.column)

    def has_key(self, key: str) -> bool:
        """Whether a partition can have this key."""
        parts = self.split(key)
        return (
            parts is not None
            and dimension_problem(parts[0]) is None
            and self.time.has_key(parts[1])
        )

    @staticmethod
    def split(key: str) -> tuple[str, str] | None:
        """Return the value of the column and the key of the time, or None for no such key."""
        value, bar, time_key = key.rpartition(MultiPartitions.BAR)
        return (value, time_key) if bar else None


PartitionBy = HashPartitions | ColumnPartitions | TimePartitions | MultiPartitions


def parse_partition_by(text: str) -> PartitionBy:
    """Read a value of ``KREA_PARTITION_BY``.

    ``hash:N``, ``column:NAME``, ``day:NAME``, ``week:NAME``, ``month:NAME``, the last three also as
    ``day:NAME@ZONE``, or with a column as ``day:NAME,column:NAME``. Raises
    :class:`~krea_dagster.errors.ConfigError` for anything else.
    """
    text = text.strip()
    kind, _, rest = text.partition(":")
    if kind == "hash" and re.fullmatch(r"[0-9]{1,9}", rest) and 1 <= int(rest) <= MAX_BUCKETS:
        return HashPartitions(int(rest))
    if kind == "column" and rest:
        return ColumnPartitions(rest)
    if kind in _UNITS and rest:
        first, comma, column = rest.partition(",column:")
        time = _time(kind, first)
        if time is not None and not comma:
            return time
        if time is not None and column:
            return MultiPartitions(time, ColumnPartitions(column))
    raise ConfigError(f"KREA_PARTITION_BY is {text!r}; it must be {_ALLOWED}")


def _time(unit: Unit, text: str) -> TimePartitions | None:
    column, at, zone = text.rpartition("@")
    if not at:
        return TimePartitions(unit, text) if text else None
    if not column:
        return None
    if zone not in available_timezones():
        raise ConfigError(
            f"{zone!r} is no time zone; use a name such as Europe/Berlin, in {unit}:{text}"
        )
    return TimePartitions(unit, column, zone)


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


def dimension_problem(value: str) -> str | None:
    """Say what keeps a text from being one part of a multi-dimensional key, or None."""
    if any(character in value for character in "[],"):
        return "must not hold '[', ']' or ',', which part lists of keys in Dagster"
    return key_problem(value)


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
    r" ?(?P<zoned>Z|z|(?P<sign>[+-])(?P<zone_hour>\d\d)(?::?(?P<zone_minute>\d\d))?)?)?",
    re.ASCII,
)


def day_of_text(text: str, zone: str = "UTC") -> str | None:
    """Return the day in a zone, ``YYYY-MM-DD``, of an ISO date or time, or None where it is none.

    A time that names no zone is taken as it stands.
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
        if match["zoned"] and zone != "UTC":
            instant = datetime.combine(day, time(), timezone.utc) + timedelta(minutes=minutes)
            return instant.astimezone(ZoneInfo(zone)).date().isoformat()
        return (day + timedelta(days=minutes // (24 * 60))).isoformat()
    except (ValueError, OverflowError):
        return None


def parse_day(key: str) -> date | None:
    """Return the day of a key ``YYYY-MM-DD``, or None where it is not one."""
    return date.fromisoformat(key) if day_of_text(key) == key else None
