"""Write the spend report: one HTML file that is complete, and has no script.

The page loads and runs nothing, as its Content-Security-Policy says. Every sum in it is exact;
quotients (dollars, credits per image) are rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date, datetime, time, timedelta, timezone
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Final
from zoneinfo import ZoneInfo

import jinja2
from markupsafe import Markup

from krea_dagster.engine.budget import Budget
from krea_dagster.engine.journal.balance_log import AccountHistory
from krea_dagster.engine.storage.page import write_page
from krea_dagster.models import UNITS_PER_CREDIT, Acknowledgement
from krea_dagster.spend.prices import PUBLISHED, CreditPrices
from krea_dagster.spend.proof.account import AccountProof
from krea_dagster.spend.report.charts import (
    BudgetMark,
    DayLabel,
    balance_chart,
    cost_chart,
    daily_chart,
    month_chart,
)
from krea_dagster.spend.report.report_data import Period, ReportFigures, figures_of
from krea_dagster.spend.tables.query import SpendLine
from krea_dagster.spend.tables.views import SpendTables
from krea_dagster.spend.text import CENT_UNITS, amount, credits_words, day_words, rough, rounded
from krea_dagster.spend.warnings.anomaly import THRESHOLD
from krea_dagster.spend.warnings.forecast import Forecast, forecast_usual
from krea_dagster.spend.warnings.history import BALANCE_DAYS, Balance, BudgetUse
from krea_dagster.spend.warnings.load_history import observe
from krea_dagster.spend.warnings.run_out import run_out_words
from krea_dagster.spend.warnings.spend_warning import SpendWarning, WarningKind
from krea_dagster.spend.warnings.warnings import find_warnings

#: Most days that the chart of days shows, up to the last.
CHART_DAYS: Final = 400
#: Days before today that the chart of the balance shows.
BALANCE_CHART_DAYS: Final = 90
#: Most unusual days that the chart labels.
_LABELS: Final = 4
_UNIT_DAYS: Final = {"day": 1, "week": 7, "month": 31}

_KINDS: Final[Mapping[WarningKind, str]] = {
    WarningKind.ACCOUNT_DIFFERS: "Account differs from the journal",
    WarningKind.BUDGET_USED: "Budget",
    WarningKind.FORECAST: "Forecast",
    WarningKind.CREDITS_RUN_OUT: "Credits run out",
    WarningKind.DAY_OUT_OF_HABIT: "Unusual day",
    WarningKind.PARTITION_OUT_OF_HABIT: "Unusual partition",
    WarningKind.STOPPED: "No purchases",
    WarningKind.LEVEL_CHANGED: "New level of spend",
    WarningKind.PRICE_CHANGED: "Price changed",
    WarningKind.FAILURE_NEW: "New failure",
    WarningKind.FAILURES_HIGH: "Many failures",
}


def write_report(
    tables: SpendTables,
    path: str | Path | BinaryIO,
    *,
    now: datetime,
    prices: CreditPrices = PUBLISHED,
    caps: Sequence[Budget] = (),
    by: Sequence[str] = (),
    account: AccountProof | None = None,
    prompts: Callable[[Sequence[str]], Mapping[str, str]] = lambda _: {},
    soft: Sequence[Budget] = (),
    acknowledgements: Mapping[str, Acknowledgement] = MappingProxyType({}),
    threshold: float = THRESHOLD,
    accounts: Sequence[AccountHistory] = (),
    balance_days: int = BALANCE_DAYS,
    since: date | None = None,
    until: date | None = None,
    zone: str = "UTC",
    title: str = "What the images cost",
) -> list[SpendWarning]:
    """Write the report to a file, atomically, or to an open binary one; return its warnings.

    Args:
        prices: What a credit costs, for the words that say it.
        caps: The hard budgets to compare with, of which those of a day and a month are drawn.
        by: Columns to add up by.
        prompts: Returns the texts of prompt_ids, where known.
        soft: The budgets that only warn.
        acknowledgements: The acknowledged warnings, by id.
        threshold: How many standard deviations unusual spend is from the usual one.
        accounts: The balances of the accounts, which a report of an earlier time leaves out.
        balance_days: Days before credits run out from which it is a warning.
        since: First day, in the time zone ``zone``, as is ``until``, the last one.

    Raises:
        ConfigError: for an unknown column or time zone.
        StorageError: where the file cannot be written.
    """
    figures = figures_of(
        tables, by=by, prompts=prompts, now=now, since=since, until=until, zone=zone
    )
    is_past = figures.today < now.astimezone(ZoneInfo(zone)).date()
    if is_past:
        # What was known at the end of the period, but for purchases that have settled since.
        now = datetime.combine(figures.today, time.max, ZoneInfo(zone))
        accounts = ()  # a balance is that of the present
    history = observe(
        tables,
        now=now,
        hard=caps,
        soft=soft,
        account=account,
        acknowledgements=acknowledgements,
        accounts=accounts,
    )
    history = replace(history, balance_days=balance_days)
    found = find_warnings(history, now, threshold)
    warnings = [one for one in found if since is None or one.until >= since]
    today = now.astimezone(timezone.utc).date()
    page = render(
        figures,
        warnings,
        now=now,
        prices=prices,
        caps=caps,
        title=title,
        zone=zone,
        budgets=history.budgets,
        forecast=forecast_usual(history.spent(today), today, history.grain_units),
        balances=None if is_past else list(zip(history.balances, accounts, strict=True)),
    ).encode()
    if isinstance(path, (str, Path)):
        write_page(Path(path), page, "the report")
    else:
        path.write(page)
    return warnings


def render(
    figures: ReportFigures,
    warnings: Sequence[SpendWarning],
    *,
    now: datetime,
    prices: CreditPrices,
    caps: Sequence[Budget],
    title: str,
    zone: str = "UTC",
    budgets: Sequence[BudgetUse] = (),
    forecast: Forecast | None,
    balances: Sequence[tuple[Balance, AccountHistory]] | None = None,
) -> str:
    """Return the page with these figures, warnings, budgets, forecast and balances.

    ``balances`` are None in a report of an earlier time.
    """
    today = figures.today
    places = 4 if _needs_four(figures) else 2
    return (
        templates()
        .get_template("report.html.j2")
        .render(
            title=title,
            figures=figures,
            warnings=warnings,
            kinds=_KINDS,
            month_budget=next((cap for cap in caps if cap.kind == "month"), None),
            forecast=forecast,
            charts=_charts(figures, warnings, forecast, caps, today),
            month_days=[period for period in figures.days if period.start >= today.replace(day=1)],
            caps=caps,
            now=now.astimezone(timezone.utc),
            today=today,
            zone=zone,
            budgets=budgets,
            prices=prices,
            balances=None
            if balances is None
            else [(one, *_balance(one, account, today)) for one, account in balances],
            money=lambda units: money_tag(units, places),
            costs=_costs,
            plain=amount,
            rough=rough,
            period_words=_period_words,
            share=share_of,
        )
    )


def _charts(
    figures: ReportFigures,
    warnings: Sequence[SpendWarning],
    forecast: Forecast | None,
    caps: Sequence[Budget],
    today: date,
) -> dict[str, Markup]:
    """Return the charts by name, as markup; empty without any day."""
    if not figures.days:
        return {"days": Markup(), "month": Markup(), "cost": Markup()}
    since = figures.last - timedelta(days=CHART_DAYS - 1)
    days = [period for period in figures.days if period.start >= since]
    by_day = {period.start: period.line.committed_units for period in days}
    total = credits_words(sum(by_day.values()))
    span = f"{day_words(days[0].start)} to {day_words(days[-1].start)}"
    day_caps = [BudgetMark("day’s budget", cap.units) for cap in caps if cap.kind == "day"]
    month_caps = [BudgetMark("month’s budget", cap.units) for cap in caps if cap.kind == "month"]
    drawn = {
        "days": daily_chart(
            days,
            day_caps,
            _labels(warnings, by_day),
            f"Bar chart of credits by day, {span}: {total} in total.",
        ),
        "month": month_chart(
            figures.days,
            today,
            month_caps,
            forecast,
            f"Line chart of the cumulative credits of {today:%B %Y}: "
            f"{credits_words(figures.month.committed_units)} so far.",
        ),
        "cost": cost_chart(
            figures.periods,
            _UNIT_DAYS[figures.unit],
            f"Line chart of credits per accepted image by {figures.unit}.",
        ),
    }
    # charts.py escapes all text that it is given.
    return {name: Markup("".join(images)) for name, images in drawn.items()}  # noqa: S704


def _balance(balance: Balance, account: AccountHistory, today: date) -> tuple[str, Markup]:
    """Return how long a balance lasts, and its chart."""
    since = today - timedelta(days=BALANCE_CHART_DAYS)
    days = [
        (reading.at.astimezone(timezone.utc).date(), reading.remaining_units)
        for reading in account.readings
    ]
    near = [one for one in days if one[0] >= since] or days[-1:]
    lasts = run_out_words(balance.run_out, today)
    label = f"Line chart of the balance since {day_words(near[0][0])}: it lasts {lasts}."
    images = balance_chart(near, today, balance.units, balance.run_out, label)
    return lasts, Markup("".join(images))  # noqa: S704 - charts.py escapes all text


def _labels(warnings: Sequence[SpendWarning], by_day: Mapping[date, int]) -> list[DayLabel]:
    """Return the labels of the most expensive unusual days."""
    unusual = [
        warning
        for warning in warnings
        if warning.kind is WarningKind.DAY_OUT_OF_HABIT and warning.since in by_day
    ]
    unusual.sort(key=lambda warning: -warning.units)
    return [
        DayLabel(day, f"{day.day} {day:%b}: {amount(by_day[day])}")
        for day in (warning.since for warning in unusual[:_LABELS])
    ]


def _needs_four(figures: ReportFigures) -> bool:
    """Return whether any sum has more than two decimals, so that columns are aligned."""
    lines = [figures.total, *(period.line for period in figures.days)]
    lines += [*figures.failures, *figures.outcomes, *figures.prompts]
    lines += [line for breakdown in figures.breakdowns for line in breakdown.lines]
    return any(
        line.charged_units % CENT_UNITS or line.at_stake_units % CENT_UNITS for line in lines
    )


def money_tag(units: float | None, places: int = 2) -> Markup:
    """Return a sum as a data element; a quotient rounded to four decimals."""
    if units is None:
        return Markup("–")
    if not isinstance(units, int):
        quotient = (Decimal(units) / UNITS_PER_CREDIT).quantize(Decimal("0.0001"), ROUND_HALF_UP)
        return Markup('<span class="quotient">{}</span>').format(f"{quotient:,}")
    exact = f"{Decimal(units) / UNITS_PER_CREDIT:.4f}"
    return Markup('<data value="{}">{}</data>').format(exact, amount(units, places))


def _costs(line: SpendLine) -> str:
    return amounts_text(line.costs())


def amounts_text(costs: Mapping[str, Fraction]) -> str:
    """Return amounts of money, each in its currency, rounded to the cent."""
    shown = sorted((costs or {"USD": Fraction(0)}).items())
    return ", ".join(f"{rounded(cost, 2):,} {name}" for name, cost in shown)


def share_of(units: int, most: int) -> str:
    """Return a bar's width in percent."""
    return f"{100 * units / most:.1f}" if most > 0 else "0"


def _period_words(period: Period, unit: str) -> str:
    if unit == "month":
        return f"{period.start:%b %Y}"
    return f"{'week of ' if unit == 'week' else ''}{day_words(period.start)}"


def _with_code(text: str) -> Markup:
    """Return a sentence with the commands between backticks as code."""
    parts = [
        Markup("<code>{}</code>").format(part) if number % 2 else Markup("{}").format(part)
        for number, part in enumerate(text.split("`"))
    ]
    return Markup("").join(parts)


@cache
def templates() -> jinja2.Environment:
    """Return the templates of the report and of statements."""
    folder = files("krea_dagster.spend.report")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    words: dict[str, Callable[..., Any]] = {"day": day_words, "with_code": _with_code}
    environment.filters.update(words)
    return environment
