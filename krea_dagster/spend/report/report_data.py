"""The figures of the report, added up exactly from the spend tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import date, datetime
from functools import partial, reduce
from typing import Final
from zoneinfo import ZoneInfo

from krea_dagster.spend.tables.measures import WITHOUT_IMAGE
from krea_dagster.spend.tables.query import SpendLine, sums
from krea_dagster.spend.tables.views import SpendTables

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
class ReportLine(SpendLine):
    """One row of a table."""

    name: str = ""
    note: str = ""
    is_rest: bool = False

    @classmethod
    def of_line(cls, line: SpendLine, note: str = "") -> ReportLine:
        """Return a line of sums as a row, named after the values that it is grouped by."""
        name = ", ".join("(none)" if value is None else value for value in line.of)
        return cls(**vars(line), name=shortened(name), note=note)


@dataclass(frozen=True)
class Period:
    """The sums of a day, week or month that begins on ``start``."""

    start: date
    line: SpendLine


@dataclass(frozen=True)
class Breakdown:
    """Sums by one or several columns."""

    title: str
    head: str
    lines: Sequence[ReportLine]


@dataclass(frozen=True)
class ReportFigures:
    """The figures that the report shows, of the days from ``since`` to ``today``.

    ``month`` and ``day`` are the sums of the month and of the day that it ends with. ``periods``
    are days, weeks or months (``unit`` says which), depending on the time covered.
    """

    first: date
    last: date
    today: date
    total: SpendLine
    month: SpendLine
    day: SpendLine
    days: Sequence[Period]
    months: Sequence[Period]
    unit: str
    periods: Sequence[Period]
    breakdowns: Sequence[Breakdown]
    failures: Sequence[ReportLine]
    outcomes: Sequence[ReportLine]
    prompts: Sequence[ReportLine]


def figures_of(
    tables: SpendTables,
    *,
    by: Sequence[str] = (),
    prompts: Callable[[Sequence[str]], Mapping[str, str]] = lambda _: {},
    now: datetime,
    since: date | None = None,
    until: date | None = None,
    zone: str = "UTC",
) -> ReportFigures:
    """Add up the tables. ``prompts`` returns the texts of prompt_ids, where known.

    ``since`` and ``until`` are days of the time zone, both included. Raises ConfigError for a
    column in ``by`` that does not exist.
    """
    today = now.astimezone(ZoneInfo(zone)).date()
    today = min(today, until or today)
    with closing(tables.open(zone=zone)) as duck:
        asked = partial(sums, duck, since=since, until=until)
        days = _periods(asked(["day"]), date.fromisoformat)
        first = days[0].start if days else today
        last = days[-1].start if days else today
        unit = "day" if (last - first).days < 45 else "week"
        unit = "month" if (last - first).days > 200 else unit
        months = _periods(asked(["month"]), _month_start)
        periods = {"day": days, "month": months}.get(unit)
        breakdowns = [("Quality and size", "Quality, size", ["quality", "size"])]
        breakdowns += [(name, name, [name]) for name in by]
        if "partition_key" not in by:
            breakdowns.append(("Partition", "Partition", ["partition_key"]))
        return ReportFigures(
            first=first,
            last=last,
            today=today,
            total=asked()[0],
            month=sums(duck, since=_later(since, today.replace(day=1)), until=until)[0],
            day=sums(duck, since=_later(since, today), until=until)[0],
            days=days,
            months=months,
            unit=unit,
            periods=_periods(asked(["week"]), _week_start) if periods is None else periods,
            breakdowns=[
                Breakdown(title, head, _with_rest(asked(columns)))
                for title, head, columns in breakdowns
            ],
            failures=_failures(asked),
            outcomes=_outcomes(asked(["outcome"], where="outcome <> 'delivered'")),
            prompts=_costliest_prompts(asked, prompts),
        )


def _periods(lines: Sequence[SpendLine], start_of: Callable[[str], date]) -> list[Period]:
    return [Period(start_of(str(line.of[0])), line) for line in lines]


def _month_start(month: str) -> date:
    return date.fromisoformat(f"{month}-01")


def _week_start(week: str) -> date:
    return date.fromisocalendar(int(week[:4]), int(week[-2:]), 1)


def _later(since: date | None, day: date) -> date:
    return day if since is None else max(since, day)


def _with_rest(
    lines: Sequence[SpendLine],
    rank: Callable[[SpendLine], tuple[int, ...]] = lambda line: (
        -line.charged_units,
        -line.at_stake_units,
    ),
) -> Sequence[ReportLine]:
    """Return the rows in their order; those beyond the first ones are added up in one."""
    rows = sorted(map(ReportLine.of_line, lines), key=lambda row: (*rank(row), row.name))
    if len(rows) <= MOST_ROWS + 1:
        return rows
    rest = rows[MOST_ROWS:]
    added = reduce(lambda one, other: one.plus(other), rest)
    name = f"{len(rest):,} others"
    return [*rows[:MOST_ROWS], replace(added, name=name, is_rest=True)]


def _failures(asked: Callable[..., list[SpendLine]]) -> Sequence[ReportLine]:
    lines = asked(["error_code"], where=f"outcome IN {WITHOUT_IMAGE}")
    named = [replace(line, of=(line.of[0] or "no code",)) for line in lines]
    return _with_rest(named, lambda line: (-line.purchases,))


def _outcomes(lines: Sequence[SpendLine]) -> list[ReportLine]:
    order = list(OUTCOMES)
    rows = [
        replace(ReportLine.of_line(line), name=OUTCOMES.get(str(line.of[0]), str(line.of[0])))
        for line in lines
    ]
    return sorted(
        rows, key=lambda row: order.index(str(row.of[0])) if row.of[0] in OUTCOMES else len(order)
    )


def _costliest_prompts(
    asked: Callable[..., list[SpendLine]], prompts: Callable[[Sequence[str]], Mapping[str, str]]
) -> list[ReportLine]:
    lines = asked(["prompt_id"], where="prompt_id IS NOT NULL", most=MOST_PROMPTS)
    texts = prompts([str(line.of[0]) for line in lines]) if lines else {}
    return [ReportLine.of_line(line, shortened(texts.get(str(line.of[0]), ""))) for line in lines]


def shortened(value: object) -> str:
    """Return a value as text on one line, cut where it is long."""
    text = "–" if value is None else " ".join(str(value).split())
    return text if len(text) <= MOST_TEXT else f"{text[: MOST_TEXT - 1]}…"
