"""Adds up the spend tables into the few hundred figures that the report shows; exact, by DuckDB."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta, timezone
from typing import Any, Final

import duckdb

from krea_dagster.errors import ConfigError
from krea_dagster.spend.tables.prompt_rows import quoted
from krea_dagster.spend.tables.verdict_rows import IS_ACCEPTED
from krea_dagster.spend.warnings.load_history import Table, connect, units_of

#: Rows of a breakdown and of the dearest prompts; what is left is one row of its own.
MOST_ROWS: Final = 12
MOST_PROMPTS: Final = 20

#: Characters of a prompt, a prompt_id or any other name that are shown.
MOST_TEXT: Final = 160

#: Outcomes of purchases that are not an image, in the order in which they are shown.
OUTCOMES: Final[Mapping[str, str]] = {
    "unknown": "Outcome unknown: bought or not",
    "pending": "Under way when last seen",
    "lost": "Paid, and lost at the server",
    "rejected": "Paid, and refused by a check",
    "replaced": "Paid, and replaced by a later image",
    "failed": "Failed at the server",
    "refused": "Refused by the server",
}


@dataclass(frozen=True)
class ReportLine:
    """One row of a table: counts of purchases, and units.

    ``accepted`` are delivered images that no later one has replaced, and that nobody has rejected
    or flagged. ``at_stake_units`` may have
    been charged, or is paid and not at hand; ``open_units``, the first of these alone, is not in
    ``charged_units``.
    """

    name: str
    asked: int = 0
    delivered: int = 0
    accepted: int = 0
    charged_units: int = 0
    at_stake_units: int = 0
    open_units: int = 0
    note: str = ""
    is_rest: bool = False

    @property
    def committed_units(self) -> int:
        """Charged, or perhaps to be charged."""
        return self.charged_units + self.open_units

    @property
    def per_accepted_units(self) -> float | None:
        """What one accepted image has cost, with all that was charged beside it."""
        return self.charged_units / self.accepted if self.accepted else None


@dataclass(frozen=True)
class Period:
    """A day, week or month, from ``start`` on, and what it came to."""

    start: date
    line: ReportLine


@dataclass(frozen=True)
class Breakdown:
    """The lines of one column, or of several."""

    title: str
    head: str
    lines: Sequence[ReportLine]


@dataclass(frozen=True)
class ReportFigures:
    """All that the report shows. ``total`` is the whole ledger, added up by itself.

    ``stretches`` are days, weeks or months (``stretch`` says which), whatever is legible.
    """

    first: date
    last: date
    total: ReportLine
    returned_units: int
    saved_units: int
    days: Sequence[Period]
    months: Sequence[Period]
    stretch: str
    stretches: Sequence[Period]
    breakdowns: Sequence[Breakdown]
    failures: Sequence[ReportLine]
    outcomes: Sequence[ReportLine]
    dearest: Sequence[ReportLine]

    def sum_since(self, start: date) -> ReportLine:
        """What was bought from a day on."""
        return _added("", (one.line for one in self.days if one.start >= start))


def figures_of(
    ledger: Table,
    daily: Table,
    failures: Table,
    *,
    by: Sequence[str] = (),
    prompts: Callable[[Sequence[str]], Mapping[str, str]] = lambda _: {},
    now: datetime,
) -> ReportFigures:
    """Add the tables up. ``prompts`` gives the texts of a few prompt_ids, as far as it has them.

    Raises ConfigError for a column in ``by`` that ``daily`` does not have.
    """
    today = now.astimezone(timezone.utc).date()
    with closing(connect({"ledger": ledger, "daily": daily, "failures": failures})) as database:
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
        stretch = "day" if (last - first).days < 45 else "week"
        stretch = "month" if (last - first).days > 200 else stretch
        breakdowns = [
            _breakdown(database, "Quality and size", "Quality, size", ["quality", "size"]),
            *(_breakdown(database, name, name, [name]) for name in by),
        ]
        if "partition_key" not in by:
            breakdowns.append(_breakdown(database, "Partition", "Partition", ["partition_key"]))
        saved = database.execute("select sum(credits_saved_by_reuse) from daily").fetchone()
        return ReportFigures(
            first=first,
            last=last,
            total=_total(database),
            returned_units=_one(database, "select sum(credits_returned) from ledger"),
            saved_units=units_of(saved[0] if saved else None),
            days=days,
            months=_grouped(days, lambda day: day.replace(day=1)),
            stretch=stretch,
            stretches=_grouped(days, _STARTS[stretch]),
            breakdowns=breakdowns,
            failures=_failures(database),
            outcomes=_outcomes(database),
            dearest=_dearest(database, prompts),
        )


_STARTS: Final[Mapping[str, Callable[[date], date]]] = {
    "day": lambda day: day,
    "week": lambda day: day - timedelta(days=day.weekday()),
    "month": lambda day: day.replace(day=1),
}

_AT_STAKE: Final = "sum(credits_unknown + if(outcome = 'pending', coalesce(credits_charged, 0), 0))"


def _ledger_sums(database: duckdb.DuckDBPyConnection) -> str:
    # Tables of an earlier version know of no verdict.
    accepted = IS_ACCEPTED if "verdict" in _names(database, "ledger") else "outcome = 'delivered'"
    return (
        "count(*), count(*) filter (outcome in ('delivered', 'replaced')), "
        f"count(*) filter ({accepted}), sum(credits_charged), {_AT_STAKE}, sum(credits_unknown)"
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


def _line(row: Sequence[Any], *, is_rest: bool = False) -> ReportLine:
    return ReportLine(
        shortened(row[0]),
        int(row[1] or 0),
        int(row[2] or 0),
        int(row[3] or 0),
        units_of(row[4]),
        units_of(row[5]),
        units_of(row[6]),
        is_rest=is_rest,
    )


def _total(database: duckdb.DuckDBPyConnection) -> ReportLine:
    row = database.execute(f"select 'All', {_ledger_sums(database)} from ledger").fetchone()
    return _line(row or ("All", 0, 0, 0, None, None, None))


def _one(database: duckdb.DuckDBPyConnection, query: str) -> int:
    row = database.execute(query).fetchone()
    return units_of(row[0] if row else None)


def _breakdown(
    database: duckdb.DuckDBPyConnection, title: str, head: str, columns: Sequence[str]
) -> Breakdown:
    name = " || ', ' || ".join(
        f"coalesce(cast({quoted(one)} as varchar), '(none)')" for one in columns
    )
    # The name is made of quoted columns of the table.
    rows = database.execute(
        f"select {name}, {_daily_sums(database)} from daily group by 1 "
        "order by sum(credits_charged) desc, sum(credits_at_stake) desc, 1"
    ).fetchall()
    lines = [_line(row) for row in rows]
    if len(lines) > MOST_ROWS + 1:
        kept, rest = lines[:MOST_ROWS], lines[MOST_ROWS:]
        lines = [*kept, _added(f"{len(rest):,} others", rest)]
    return Breakdown(title, head, lines)


def _failures(database: duckdb.DuckDBPyConnection) -> list[ReportLine]:
    rows = database.execute(
        "select coalesce(error_code, 'no code'), sum(count), sum(credits) from failures "
        "group by 1 order by 2 desc, 1"
    ).fetchall()
    lines = [
        ReportLine(shortened(name), asked=int(count), charged_units=units_of(credits))
        for name, count, credits in rows
    ]
    if len(lines) > MOST_ROWS + 1:
        kept, rest = lines[:MOST_ROWS], lines[MOST_ROWS:]
        lines = [*kept, _added(f"{len(rest):,} others", rest)]
    return lines


def _outcomes(database: duckdb.DuckDBPyConnection) -> list[ReportLine]:
    rows = database.execute(
        f"select outcome, count(*), sum(credits_charged), {_AT_STAKE} from ledger "
        "where outcome <> 'delivered' group by 1"
    ).fetchall()
    found = {row[0]: row for row in rows}
    order = [*OUTCOMES, *sorted(set(found) - set(OUTCOMES))]
    return [
        ReportLine(
            OUTCOMES.get(name, name),
            asked=int(found[name][1]),
            charged_units=units_of(found[name][2]),
            at_stake_units=units_of(found[name][3]),
        )
        for name in order
        if name in found
    ]


def _dearest(
    database: duckdb.DuckDBPyConnection, prompts: Callable[[Sequence[str]], Mapping[str, str]]
) -> list[ReportLine]:
    rows = database.execute(
        f"select prompt_id, {_ledger_sums(database)} from ledger "
        "where prompt_id is not null group by 1 order by "
        "coalesce(sum(credits_charged), 0) + coalesce(sum(credits_unknown), 0) desc, 1 "
        f"limit {MOST_PROMPTS}"
    ).fetchall()
    texts = prompts([row[0] for row in rows]) if rows else {}
    return [replace(_line(row), note=shortened(texts.get(row[0], ""))) for row in rows]


def _grouped(days: Iterable[Period], start_of: Callable[[date], date]) -> list[Period]:
    groups: dict[date, list[ReportLine]] = {}
    for one in days:
        groups.setdefault(start_of(one.start), []).append(one.line)
    return [Period(start, _added("", lines)) for start, lines in groups.items()]


def _added(name: str, lines: Iterable[ReportLine]) -> ReportLine:
    asked = delivered = accepted = charged = at_stake = unsettled = 0
    for line in lines:
        asked += line.asked
        delivered += line.delivered
        accepted += line.accepted
        charged += line.charged_units
        at_stake += line.at_stake_units
        unsettled += line.open_units
    return ReportLine(
        name, asked, delivered, accepted, charged, at_stake, unsettled, is_rest=bool(name)
    )


def shortened(value: object) -> str:
    """A name or a prompt as it is shown: as text, on one line, and not too long of it."""
    text = "–" if value is None else " ".join(str(value).split())
    return text if len(text) <= MOST_TEXT else f"{text[: MOST_TEXT - 1]}…"
