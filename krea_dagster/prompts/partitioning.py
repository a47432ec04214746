"""The ways to partition a prompt table, and the rules for partition keys. Pure.

A partition key is text that Dagster accepts, that a person can type, and that :func:`safe_name`
turns into the name of a file.
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
from urllib.parse import quote
from zoneinfo import ZoneInfo, available_timezones

from krea_dagster.errors import ConfigError

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
    "hash:N (N from 1 to 10000), column:NAME, day:NAME, week:NAME or month:NAME; the last three "
    "also with a time zone (day:NAME@Europe/Berlin) or a column (day:NAME,column:NAME)"
)


@dataclass(frozen=True)
class HashPartitions:
    """``hash:N``: a row's bucket follows from its prompt_id. The keys are known in advance.

    The bucket is the upper half of the prompt_id's MurmurHash64A modulo N (``identity.buckets``).
    That hash takes a fraction of the time of a cryptographic one, which matters where one partition
    is read from a table of millions of rows.
    """

    count: int

    def __str__(self) -> str:
        return f"hash:{self.count}"

    @property
    def columns(self) -> tuple[str, ...]:
        """No columns but prompt_id."""
        return ()

    def has_key(self, key: str) -> bool:
        """Return whether a partition can have this key."""
        return key in self._keys

    def keys(self) -> list[str]:
        """Return all keys, sorted: ``bucket-000`` …."""
        width = max(3, len(str(self.count - 1)))
        return [f"bucket-{bucket:0{width}d}" for bucket in range(self.count)]

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
        """The columns that decide the partition."""
        return (self.column,)

    def has_key(self, key: str) -> bool:
        """Return whether a partition can have this key."""
        return key_problem(key) is None


@dataclass(frozen=True)
class TimePartitions:
    """``day:NAME``, ``week:NAME`` or ``month:NAME``: a row's key is the day, week or month of it.

    The key is the first day of the unit, ``YYYY-MM-DD``; weeks begin on Mondays. A time with a
    zone is converted to ``zone``; one without is not converted.
    """

    unit: Unit
    column: str
    zone: str = "UTC"

    def __str__(self) -> str:
        zone = "" if self.zone == "UTC" else f"@{self.zone}"
        return f"{self.unit}:{self.column}{zone}"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that decide the partition."""
        return (self.column,)

    def key_of(self, day: date) -> str:
        """Return the key of a day."""
        return self._first(day).isoformat()

    def has_key(self, key: str) -> bool:
        """Return whether a partition can have this key: the first day of a unit."""
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
            # The first day of year 1 is a Monday, so that no week begins before it.
            return day - timedelta(days=day.weekday())
        return day.replace(day=1)


@dataclass(frozen=True)
class MultiPartitions:
    """``day:NAME,column:NAME``: a row's key joins the value of a column and a time.

    Dagster writes the dimensions in the order of their names, ``column`` and the unit:
    ``flux|2026-11-02``.
    """

    #: Separates the parts of a key.
    BAR: ClassVar[str] = "|"

    time: TimePartitions
    by_column: ColumnPartitions

    def __str__(self) -> str:
        return f"{self.time},{self.by_column}"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that decide the partition."""
        return (self.by_column.column, self.time.column)

    def has_key(self, key: str) -> bool:
        """Return whether a partition can have this key."""
        parts = self.split(key)
        return (
            parts is not None
            and dimension_problem(parts[0]) is None
            and self.time.has_key(parts[1])
        )

    @staticmethod
    def split(key: str) -> tuple[str, str] | None:
        """Return the value of the column and the key of the time, or None without a bar."""
        value, bar, time_key = key.rpartition(MultiPartitions.BAR)
        return (value, time_key) if bar else None


PartitionBy = HashPartitions | ColumnPartitions | TimePartitions | MultiPartitions


def parse_partition_by(text: str, name: str = "partition_by") -> PartitionBy:
    """Parse the way in which a prompt table is partitioned.

    Args:
        text: ``hash:N`` (N buckets, up to 10000, by prompt_id),
            ``column:NAME`` (by the values of a column), or ``day:NAME``, ``week:NAME``,
            ``month:NAME`` (by a column of dates or times). The last three also with a time zone,
            ``day:NAME@Europe/Berlin``, or with a column, ``day:NAME,column:NAME``.
        name: The name of the setting, for the error.

    Returns:
        The partitioning, for :class:`PromptTable`.

    Raises:
        ConfigError: The text is not one of these.
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
    raise ConfigError(f"{name} is {text!r}; it must be {_ALLOWED}")


def _time(unit: Unit, text: str) -> TimePartitions | None:
    column, at, zone = text.rpartition("@")
    if not at:
        return TimePartitions(unit, text) if text else None
    if not column:
        return None
    if zone not in available_timezones():
        raise ConfigError(
            f"unknown time zone {zone!r} in {unit}:{text}; use a name such as Europe/Berlin"
        )
    return TimePartitions(unit, column, zone)


def key_problem(key: str) -> str | None:
    """Return why a text cannot be a partition key, or None if it can.

    Dagster accepts some of these and then misreads them: an empty key as no partition, "..." as a
    range, "|" as the separator of a multi-dimensional key.
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
    """Return why a text cannot be one part of a multi-dimensional key, or None if it can."""
    if any(character in value for character in "[],"):
        return "must not hold '[', ']' or ',', which separate lists of keys in Dagster"
    return key_problem(value)


def safe_name(key: str) -> str:
    """Return a file or folder name for a key, valid on every file system.

    It is percent-quoted, also a leading "." or "_": readers of Parquet folders skip such files, and
    "." and ".." would be directories. Two keys never share a name. A name over 200 bytes is cut,
    and ends in "@" and a hash of the whole key.
    """
    name = quote(key, safe="")
    if name.startswith((".", "_")):
        name = f"%{ord(name[0]):02X}{name[1:]}"
    if len(name) <= MAX_NAME:
        return name
    # quote() never leaves an "@", so that no short key can have the name of a long one.
    tail = f"@{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    return name[: MAX_NAME - len(tail)] + tail


_ISO: Final = re.compile(
    r"(?P<day>\d{4}-\d\d-\d\d)"
    r"(?:[T ](?P<hour>\d\d):(?P<minute>\d\d)(?::(?P<second>\d\d)(?:[.,]\d+)?)?"
    r" ?(?P<zoned>Z|z|(?P<sign>[+-])(?P<zone_hour>\d\d)(?::?(?P<zone_minute>\d\d))?)?)?",
    re.ASCII,
)


def day_of_text(text: str, zone: str = "UTC") -> str | None:
    """Return the day in a zone, ``YYYY-MM-DD``, of an ISO date or time; None for other text.

    A time that names no zone is not converted.
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
    """Return the day of a key ``YYYY-MM-DD``; None for other text."""
    return date.fromisoformat(key) if day_of_text(key) == key else None
