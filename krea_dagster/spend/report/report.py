"""Writes the report on what was spent: one HTML file with everything in it, and no script.

The page loads nothing and runs nothing, and says so to the browser by its Content-Security-Policy.
Every sum in it is exact; what was divided (dollars, credits an image) is rounded.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import date, datetime, timedelta, timezone
from decimal import ROUND_HALF_UP, Decimal
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO, Final

import jinja2
from markupsafe import Markup

from krea_dagster.engine.budget import CREDITS_PER_USD, Budget
from krea_dagster.errors import ConfigError, StorageError
from krea_dagster.models import UNITS_PER_CREDIT, units_from_credits
from krea_dagster.spend.proof.account import AccountProof
from krea_dagster.spend.report.charts import (
    BudgetMark,
    DayLabel,
    cost_chart,
    daily_chart,
    month_chart,
)
from krea_dagster.spend.report.report_data import Period, ReportFigures, figures_of
from krea_dagster.spend.warnings.anomaly import (
    Forecast,
    anomalous_days,
    find_anomalies,
    forecast_month,
)
from krea_dagster.spend.warnings.history import amount, credits_words, day_words, rough
from krea_dagster.spend.warnings.load_history import Table, observe
from krea_dagster.spend.warnings.warnings import SpendWarning, WarningKind, find_warnings

#: Days that the chart of days shows at most, up to the last.
CHART_DAYS: Final = 400
#: Days of an odd day's name that the chart shows.
_MARKS: Final = 4
_STRETCH_DAYS: Final = {"day": 1, "week": 7, "month": 31}

_KINDS: Final[Mapping[WarningKind, str]] = {
    WarningKind.ACCOUNT_DIFFERS: "Account against journal",
    WarningKind.BUDGET_USED: "Budget",
    WarningKind.FORECAST: "Forecast",
    WarningKind.DAY_OUT_OF_HABIT: "A day out of habit",
    WarningKind.PARTITION_OUT_OF_HABIT: "A partition out of habit",
    WarningKind.PRICE_CHANGED: "Price changed",
    WarningKind.FAILURE_NEW: "New kind of failure",
    WarningKind.FAILURES_HIGH: "Many failures",
}


def write_report(
    ledger: Table,
    daily: Table,
    failures: Table,
    path: str | Path | BinaryIO,
    *,
    now: datetime,
    rate: float = CREDITS_PER_USD,
    caps: Sequence[Budget] = (),
    by: Sequence[str] = (),
    account: AccountProof | None = None,
    prompts: Callable[[Sequence[str]], Mapping[str, str]] = lambda _: {},
    title: str = "What the images cost",
) -> list[SpendWarning]:
    """Write the report to a file, atomically, or into an open binary one; returns its warnings.

    The tables are the three of the spend folder, as Arrow tables or datasets. ``rate`` is credits
    to the US dollar, ``caps`` the budgets to draw (day and month) and to
    hold the figures against, ``by`` further
    columns of ``daily`` to add up by. ``prompts`` gives texts for the dearest prompt_ids, as far
    as it has them. Raises ConfigError for a column that is not there or a rate that cannot be,
    and StorageError where the file cannot be written.
    """
    if not rate > 0:
        raise ConfigError(f"the rate must be credits to the dollar, more than 0, not {rate:g}")
    figures = figures_of(ledger, daily, failures, by=by, prompts=prompts, now=now)
    history = observe(ledger, daily, failures, now=now, budgets=caps, account=account)
    warnings = find_warnings(history, now)
    page = render(figures, warnings, now=now, rate=rate, caps=caps, title=title).encode()
    if isinstance(path, (str, Path)):
        _write(Path(path), page)
    else:
        path.write(page)
    return warnings


def render(
    figures: ReportFigures,
    warnings: Sequence[SpendWarning],
    *,
    now: datetime,
    rate: float,
    caps: Sequence[Budget],
    title: str,
) -> str:
    """The report's page, from the figures and warnings that it shows."""
    today = now.astimezone(timezone.utc).date()
    places = 4 if _needs_four(figures) else 2
    forecast = _forecast(figures, today)
    return (
        _templates()
        .get_template("report.html.j2")
        .render(
            title=title,
            figures=figures,
            warnings=warnings,
            kinds=_KINDS,
            month=figures.sum_since(today.replace(day=1)),
            day=figures.sum_since(today),
            month_budget=next((cap for cap in caps if cap.kind == "month"), None),
            forecast=forecast,
            charts=_charts(figures, warnings, forecast, caps, today),
            month_days=[one for one in figures.days if one.start >= today.replace(day=1)],
            caps=caps,
            now=now.astimezone(timezone.utc),
            today=today,
            rate=rate,
            money=lambda units: _money(units, places),
            usd=lambda units: _usd(units, rate),
            plain=amount,
            rough=rough,
            stretch_words=_stretch_words,
            share=_share,
        )
    )


def _charts(
    figures: ReportFigures,
    warnings: Sequence[SpendWarning],
    forecast: Forecast | None,
    caps: Sequence[Budget],
    today: date,
) -> dict[str, Markup]:
    """The charts by name, as markup; of what has no days there are none."""
    if not figures.days:
        return {"days": Markup(), "month": Markup(), "cost": Markup()}
    since = figures.last - timedelta(days=CHART_DAYS - 1)
    days = [one for one in figures.days if one.start >= since]
    odd = sorted(
        (
            one
            for one in warnings
            if one.kind is WarningKind.DAY_OUT_OF_HABIT and one.since >= since
        ),
        key=lambda one: -one.units,
    )
    by_day = {one.start: one.line.committed_units for one in days}
    marks = [
        DayLabel(one.since, f"{one.since.day} {one.since:%b}: {amount(by_day[one.since])}")
        for one in odd[:_MARKS]
        if one.since in by_day
    ]
    total = credits_words(sum(by_day.values()))
    span = f"{day_words(days[0].start)} to {day_words(days[-1].start)}"
    day_caps = [BudgetMark("day’s budget", cap.units) for cap in caps if cap.kind == "day"]
    month_caps = [BudgetMark("month’s budget", cap.units) for cap in caps if cap.kind == "month"]
    month = figures.sum_since(today.replace(day=1))
    drawn = {
        "days": daily_chart(
            days, day_caps, marks, f"Bar chart of credits by day, {span}: {total} in all."
        ),
        "month": month_chart(
            figures.days,
            today,
            month_caps,
            forecast,
            f"Line chart of the credits of {today:%B %Y}, added up by day: "
            f"{credits_words(month.committed_units)} so far.",
        ),
        "cost": cost_chart(
            figures.stretches,
            _STRETCH_DAYS[figures.stretch],
            f"Line chart of credits for each accepted image by {figures.stretch}.",
        ),
    }
    # Made by charts.py, which escapes what it did not write itself.
    return {name: Markup("".join(pictures)) for name, pictures in drawn.items()}  # noqa: S704


def _forecast(figures: ReportFigures, today: date) -> Forecast | None:
    spent = {one.start: one.line.committed_units for one in figures.days if one.start <= today}
    return forecast_month(spent, today, anomalous_days(find_anomalies(spent, today)))


def _needs_four(figures: ReportFigures) -> bool:
    """Whether any sum has more than two decimals, so that columns are even."""
    lines = [figures.total, *(one.line for one in figures.days), *figures.failures]
    lines += [*figures.outcomes, *figures.dearest]
    lines += [line for one in figures.breakdowns for line in one.lines]
    cent = UNITS_PER_CREDIT // 100
    return any(line.charged_units % cent or line.at_stake_units % cent for line in lines)


def _money(units: float | None, places: int) -> Markup:
    """A sum as a machine and a person read it; a quotient is rounded to four decimals."""
    if units is None:
        return Markup("–")
    if not isinstance(units, int):
        quotient = (Decimal(units) / UNITS_PER_CREDIT).quantize(Decimal("0.0001"), ROUND_HALF_UP)
        return Markup('<span class="quotient">{}</span>').format(f"{quotient:,}")
    exact = f"{Decimal(units) / UNITS_PER_CREDIT:.4f}"
    return Markup('<data value="{}">{}</data>').format(exact, amount(units, places))


def _usd(units: int, rate: float) -> str:
    """Dollars to the cent, made from the sum of credits."""
    dollars = Decimal(units) / units_from_credits(rate)
    return f"${dollars.quantize(Decimal('0.01'), ROUND_HALF_UP):,}"


def _share(units: int, most: int) -> str:
    """A bar's width, in percent."""
    return f"{100 * units / most:.1f}" if most > 0 else "0"


def _stretch_words(one: Period, stretch: str) -> str:
    if stretch == "month":
        return f"{one.start:%b %Y}"
    return f"{'week of ' if stretch == 'week' else ''}{day_words(one.start)}"


def _with_code(text: str) -> Markup:
    """A sentence with its commands, which stand between backticks, as code."""
    parts = [
        Markup("<code>{}</code>").format(part) if number % 2 else Markup("{}").format(part)
        for number, part in enumerate(text.split("`"))
    ]
    return Markup("").join(parts)


@cache
def _templates() -> jinja2.Environment:
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


def _write(path: Path, page: bytes) -> None:
    """Write beside it and rename, so that nobody ever opens half a page."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(page)
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except OSError:
            with suppress(OSError):
                Path(name).unlink()
            raise
    except OSError as error:
        raise StorageError(f"the report cannot be written to {path}: {error}") from error
