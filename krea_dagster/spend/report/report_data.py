"""The figures of the report, added up exactly from the spend tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from datetime import date, datetime, timedelta, timezone
from typing import Any, Final

import duckdb

from krea_dagster.errors import ConfigError
from krea_dagster.spend.tables.query import SpendTables
from krea_dagster.spend.tables.sql import (
    AT_STAKE,
    COMMITTED,
    IS_ACCEPTED,
    count_of,
    quoted,
    units_of,
)

#: Rows of a breakdown, after which the others are added up in one row, and of the prompts.
MOST_ROWS: Final = 12
MOST_PROMPTS: Final = 20

#: Characters of a prompt or a name that are shown.
MOST_TEXT: Final = 160

#: Outcomes of purchases without an image in use, in the order in which they are shown.
OUTCOMES: Final[Mapping[str, str]] = {
    "unknown": "Outcome unknown: may have been bought",
    "pending": "In progress when last seen",
    "lost": "Paid, and the image is lost",
    "rejected": "Paid, and the file was rejected by a check",
    "replaced": "Paid, and replaced by a later image",
    "failed": "Failed at the server",
    "refused": "Refused by the server",
}


@dataclass(frozen=True)
class ReportLine:
    """One row of a table: counts of purchases, and units.

    ``accepted`` counts delivered images that were not replaced, rejected or flagged.
    ``at_stake_units`` may have been charged, or are paid for an image that is not stored yet;
    ``open_units`` are only the former, which ``charged_units`` leaves out.
    """

    name: str
    purchases: int = 0
    delivered: int = 0
    accepted: int = 0
    charged_units: int = 0
    at_stake_units: int = 0
    open_units: int = 0
    note: str = ""
    is_rest: bool = False

    @property
    def committed_units(self) -> int:
        """Units that were charged, or may be charged."""
        return self.charged_units + self.open_units

    @property
    def per_accepted_units(self) -> float | None:
        """All that was charged, per accepted image."""
        return self.charged_units / self.accepted if self.accepted else None


#: The fields that are added up.
_SUMS: Final = tuple(field.name for field in fields(ReportLine) if type(field.default) is int)


@dataclass(frozen=True)
class Period:
    """The sums of a day, week or month that begins on ``start``."""

    start: date
    line: ReportLine


@dataclass(frozen=True)
class Breakdown:
    """Sums by one or several columns."""

    title: str
    head: str
    lines: Sequence[ReportLine]


@dataclass(frozen=True)
class ReportFigures:
    """The figures that the report shows.

    ``total`` is added up from the whole ledger. ``periods`` are days, weeks or months (``unit``
    says which), depending on the time covered.
    """

    first: date
    last: date
    total: ReportLine
    returned_units: int
    saved_units: int
    days: Sequence[Period]
    months: Sequence[Period]
    unit: str
    periods: Sequence[Period]
    breakdowns: Sequence[Breakdown]
    failures: Sequence[ReportLine]
    outcomes: Sequence[ReportLine]
    prompts: Sequence[ReportLine]

    def sum_since(self, start: date) -> ReportLine:
        """Return the sums from a day on."""
        return _added("", (period.line for period in self.days if period.start >= start))


def figures_of(
    tables: SpendTables,
    *,
    by: Sequence[str] = (),
    prompts: Callable[[Sequence[str]], Mapping[str, str]] = lambda _: {},
    now: datetime,
) -> ReportFigures:
    """Add up the tables. ``prompts`` returns the texts of prompt_ids, where known.

    Raises ConfigError for a column in ``by`` that ``daily`` does not have.
    """
    today = now.astimezone(timezone.utc).date()
    with closing(tables.open()) as database:
        names = _names(database, "daily")
        if missing := [name for name in by if name not in names]:
            raise ConfigError(
                f"spend_daily has no column {', '.join(missing)}; it has {', '.join(names)}"
            )
        days = [
            Period(row[0], _line(row))
            for row in database.execute(
                f"select day, {_ledger_sums(database)} from ledger group by day order by day"
            ).fetchall()
        ]
        first = days[0].start if days else today
        last = days[-1].start if days else today
        unit = "day" if (last - first).days < 45 else "week"
        unit = "month" if (last - first).days > 200 else unit
        breakdowns = [
            _breakdown(database, "Quality and size", "Quality, size", ["quality", "size"]),
            *(_breakdown(database, name, name, [name]) for name in by),
        ]
        if "partition_key" not in by:
            breakdowns.append(_breakdown(database, "Partition", "Partition", ["partition_key"]))
        return ReportFigures(
            first=first,
            last=last,
            total=_total(database),
            returned_units=_units(database, "select sum(credits_returned) from ledger"),
            saved_units=_units(database, "select sum(credits_saved_by_reuse) from daily"),
            days=days,
            months=_grouped(days, lambda day: day.replace(day=1)),
            unit=unit,
            periods=_grouped(days, _STARTS[unit]),
            breakdowns=breakdowns,
            failures=_failures(database),
            outcomes=_outcomes(database),
            prompts=_costliest_prompts(database, prompts),
        )


_STARTS: Final[Mapping[str, Callable[[date], date]]] = {
    "day": lambda day: day,
    "week": lambda day: day - timedelta(days=day.weekday()),
    "month": lambda day: day.replace(day=1),
}


def _ledger_sums(database: duckdb.DuckDBPyConnection) -> str:
    # Tables of an earlier version have no verdict.
    accepted = IS_ACCEPTED if "verdict" in _names(database, "ledger") else "outcome = 'delivered'"
    return (
        f"count(*), {count_of('delivered', 'replaced')}, count(*) filter ({accepted}), "
        f"sum(credits_charged), {AT_STAKE}, sum(credits_unknown)"
    )


def _daily_sums(database: duckdb.DuckDBPyConnection) -> str:
    known = "accepted" in _names(database, "daily")
    accepted = "sum(accepted)" if known else "sum(delivered) - sum(replaced)"
    return (
        f"sum(images_asked), sum(delivered), {accepted}, "
        "sum(credits_charged), sum(credits_at_stake), null"
    )


def _names(database: duckdb.DuckDBPyConnection, table: str) -> list[str]:
    return [row[0] for row in database.execute(f"describe {table}").fetchall()]


def _line(row: Sequence[Any]) -> ReportLine:
    return ReportLine(
        shortened(row[0]),
        purchases=int(row[1] or 0),
        delivered=int(row[2] or 0),
        accepted=int(row[3] or 0),
        charged_units=units_of(row[4]),
        at_stake_units=units_of(row[5]),
        open_units=units_of(row[6]),
    )


def _total(database: duckdb.DuckDBPyConnection) -> ReportLine:
    (row,) = database.execute(f"select 'All', {_ledger_sums(database)} from ledger").fetchall()
    return _line(row)


def _units(database: duckdb.DuckDBPyConnection, query: str) -> int:
    ((credits,),) = database.execute(query).fetchall()
    return units_of(credits)


def _breakdown(
    database: duckdb.DuckDBPyConnection, title: str, head: str, columns: Sequence[str]
) -> Breakdown:
    name = " || ', ' || ".join(
        f"coalesce(cast({quoted(column)} as varchar), '(none)')" for column in columns
    )
    rows = database.execute(
        f"select {name}, {_daily_sums(database)} from daily group by 1 "
        "order by sum(credits_charged) desc, sum(credits_at_stake) desc, 1"
    ).fetchall()
    return Breakdown(title, head, _with_rest([_line(row) for row in rows]))


def _with_rest(lines: Sequence[ReportLine]) -> Sequence[ReportLine]:
    """Add up the lines beyond the first ones in one line."""
    if len(lines) <= MOST_ROWS + 1:
        return lines
    rest = lines[MOST_ROWS:]
    return [*lines[:MOST_ROWS], _added(f"{len(rest):,} others", rest)]


def _failures(database: duckdb.DuckDBPyConnection) -> Sequence[ReportLine]:
    rows = database.execute(
        "select coalesce(error_code, 'no code'), sum(count), sum(credits) from failures "
        "group by 1 order by 2 desc, 1"
    ).fetchall()
    return _with_rest(
        [
            ReportLine(shortened(name), purchases=int(count), charged_units=units_of(credits))
            for name, count, credits in rows
        ]
    )


def _outcomes(database: duckdb.DuckDBPyConnection) -> list[ReportLine]:
    rows = database.execute(
        f"select outcome, count(*), sum(credits_charged), {AT_STAKE} from ledger "
        "where outcome <> 'delivered' group by 1"
    ).fetchall()
    found = {row[0]: row for row in rows}
    order = [*OUTCOMES, *sorted(set(found) - set(OUTCOMES))]
    return [
        ReportLine(
            OUTCOMES.get(name, name),
            purchases=int(found[name][1]),
            charged_units=units_of(found[name][2]),
            at_stake_units=units_of(found[name][3]),
        )
        for name in order
        if name in found
    ]


def _costliest_prompts(
    database: duckdb.DuckDBPyConnection, prompts: Callable[[Sequence[str]], Mapping[str, str]]
) -> list[ReportLine]:
    rows = database.execute(
        f"select prompt_id, {_ledger_sums(database)} from ledger "
        "where prompt_id is not null group by 1 order by "
        f"{COMMITTED} desc, 1 "
        f"limit {MOST_PROMPTS}"
    ).fetchall()
    texts = prompts([row[0] for row in rows]) if rows else {}
    return [replace(_line(row), note=shortened(texts.get(row[0], ""))) for row in rows]


def _grouped(days: Iterable[Period], start_of: Callable[[date], date]) -> list[Period]:
    groups: dict[date, list[ReportLine]] = {}
    for period in days:
        groups.setdefault(start_of(period.start), []).append(period.line)
    return [Period(start, _added("", lines)) for start, lines in groups.items()]


def _added(name: str, lines: Iterable[ReportLine]) -> ReportLine:
    sums: dict[str, Any] = dict.fromkeys(_SUMS, 0)
    for line in lines:
        for field in _SUMS:
            sums[field] += getattr(line, field)
    return ReportLine(name, **sums, is_rest=bool(name))


def shortened(value: object) -> str:
    """Return a value as text on one line, cut where it is long."""
    text = "–" if value is None else " ".join(str(value).split())
    return text if len(text) <= MOST_TEXT else f"{text[: MOST_TEXT - 1]}…"
