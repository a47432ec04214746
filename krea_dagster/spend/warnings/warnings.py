"""Find warnings: budgets, forecast, balance, unusual spend, prices, failures. Pure.

A finding about the past depends only on the days before it: a year read at its end has the same
findings as a look on each day. But a lower level that turns out to be a stop is then a stop.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date, datetime, timezone
from math import sqrt
from typing import Final

from krea_dagster.spend.text import credits_words, day_words, rough
from krea_dagster.spend.warnings.anomaly import LEARNING_DAYS, THRESHOLD, WINDOW_DAYS
from krea_dagster.spend.warnings.forecast import Forecast, days_left, forecast_usual
from krea_dagster.spend.warnings.history import (
    AccountUse,
    Balance,
    BudgetUse,
    DaySpend,
    PriceSeen,
    SpendHistory,
)
from krea_dagster.spend.warnings.run_out import run_out_words
from krea_dagster.spend.warnings.spend_warning import Level, SpendWarning, WarningKind, on_days
from krea_dagster.spend.warnings.unusual import find_unusual

#: Used share of a budget from which it is a warning.
NEARLY_USED: Final = 0.8
#: How far the used share of a month's budget may be ahead of the elapsed share of the month.
AHEAD_OF_DAYS: Final = 0.1
#: Calls at a new price from which it counts as one.
LEAST_CALLS: Final = 3
#: Failures with a new code on one day from which it counts, and days after which an old code is
#: new again.
LEAST_FAILURES: Final = 3
AWAY_DAYS: Final = 90
#: Standard deviations and share by which the share of failures must exceed the usual one.
TROUBLE_DEVIATIONS: Final = 6.0
TROUBLE_POINTS: Final = 0.05
#: Purchases without an image on a day from which they can be many.
LEAST_TROUBLE: Final = 5


def find_warnings(
    history: SpendHistory, now: datetime, threshold: float = THRESHOLD
) -> list[SpendWarning]:
    """Find all warnings up to ``now``: errors first, acknowledged ones last, the latest first.

    Budgets and the forecast concern today and this month; the others any day of the history.
    ``threshold`` is how many standard deviations unusual spend is from the usual one.
    """
    today = now.astimezone(timezone.utc).date()
    spent = history.spent(today)
    grain_units = history.grain_units
    found = [
        *_account(history.account, today),
        *_budgets(history.budgets, today, now),
        *_forecast(history.budgets, forecast_usual(spent, today, grain_units), today),
        *_balances(history.balances, history.balance_days, today),
        *find_unusual(history, today, threshold),
        *_prices(history.prices, today),
        *_new_failures(history, today),
        *_many_failures(history.days, today),
    ]
    order = list(WarningKind)
    found.sort(
        key=lambda warning: (-warning.until.toordinal(), order.index(warning.kind), warning.about)
    )
    known = history.acknowledgements
    found = [replace(one, acknowledgement=known.get(one.warning_id)) for one in found]
    return sorted(
        found, key=lambda one: (one.acknowledgement is not None, one.level is not Level.ERROR)
    )


def _account(account: AccountUse | None, today: date) -> Iterator[SpendWarning]:
    if account is None or account.unexplained_units == 0:
        return
    units = account.unexplained_units
    how = "more than the journal explains" if units > 0 else "less than the journal's charges"
    yield SpendWarning(
        WarningKind.ACCOUNT_DIFFERS,
        f"The account used {credits_words(account.used_units)}, {credits_words(abs(units))} {how}.",
        account.since,
        today,
        "Check whether the key is used elsewhere, then run `krea-dagster verify`.",
        abs(units),
    )


def _budgets(uses: Sequence[BudgetUse], today: date, now: datetime) -> Iterator[SpendWarning]:
    month_days = today.day + days_left(today)
    moment = now.astimezone(timezone.utc)
    hours = moment.hour + moment.minute / 60
    for use in uses:
        if use.cap_units <= 0:
            share = float("inf") if use.used_units else 0.0
        else:
            share = use.used_units / use.cap_units
        elapsed = (today.day - 1 + hours / 24) / month_days
        ahead = use.period == "month" and share > elapsed + AHEAD_OF_DAYS
        if share < NEARLY_USED and not ahead:
            continue
        if use.period == "month" and share < 1 and not ahead:
            continue  # a month's budget may be nearly used when the month is nearly over
        of = "" if share == float("inf") else f" ({share:.0%})"
        name = {"day": day_words(today), "month": f"{today:%B %Y}", "total": use.name}[use.period]
        period = {"day": f"{today}", "month": f"{today:%Y-%m}", "total": ""}[use.period]
        text = (
            f"{credits_words(use.used_units)} of {credits_words(use.cap_units)}{of} of the "
            f"budget for {name} are used"
        )
        if use.period == "month":
            text += f", with {elapsed:.0%} of the month gone"
        yield SpendWarning(
            WarningKind.BUDGET_USED,
            f"{text}.",
            today.replace(day=1) if use.period == "month" else today,
            today,
            "Request fewer images, or raise the budget; `krea-dagster spend` shows the use.",
            use.used_units,
            use.name,
            f"{use.name}\n{use.cap_units}\n{period}",
            share,
        )


def _forecast(
    uses: Sequence[BudgetUse], forecast: Forecast | None, today: date
) -> Iterator[SpendWarning]:
    caps = [use for use in uses if use.period == "month"]
    if forecast is None:
        return
    for use in caps:
        if forecast.expected_units <= use.cap_units:
            continue
        sure = "almost certainly" if forecast.low_units > use.cap_units else "probably"
        yield SpendWarning(
            WarningKind.FORECAST,
            f"{today:%B %Y} will {sure} exceed its budget of {credits_words(use.cap_units)}: "
            f"about {rough(forecast.expected_units)} are expected by its end "
            f"(90 % interval: {rough(forecast.low_units)} to {rough(forecast.high_units)}).",
            today,
            today,
            "Postpone rows that can wait, or set a hard budget, which defers rows in time.",
            forecast.expected_units - use.cap_units,
            use.name,
            f"{use.name}\n{use.cap_units}\n{today:%Y-%m}",
        )


def _balances(balances: Sequence[Balance], least_days: int, today: date) -> Iterator[SpendWarning]:
    for one in balances:
        expected = one.run_out.expected if one.run_out else None
        until = today if one.units <= 0 else expected
        if not one.is_used or until is None or (until - today).days >= least_days:
            continue
        left = f"{credits_words(one.units)} left, {run_out_words(one.run_out, today)}"
        name = f"account {one.account}" if len(balances) > 1 else "account"
        yield SpendWarning(
            WarningKind.CREDITS_RUN_OUT,
            f"The {name} has {'no credits left' if one.units <= 0 else left}.",
            today,
            today,
            "Top up, or request fewer images: what the account cannot pay stops a run.",
            max(0, one.units),
            one.account,
            f"{one.account}\n{one.risen_on}",
        )


def _prices(prices: Sequence[PriceSeen], today: date) -> Iterator[SpendWarning]:
    """Compare the price that most calls of a day were charged with that of the days before."""
    by_quality: dict[str, dict[date, list[PriceSeen]]] = defaultdict(lambda: defaultdict(list))
    for seen in prices:
        if seen.day <= today and seen.units > 0:
            by_quality[seen.quality][seen.day].append(seen)
    for quality, days in sorted(by_quality.items()):
        steps = _price_steps(days)
        for number, (since, units) in enumerate(steps[1:], start=1):
            before = steps[number - 1][1]
            end = steps[number + 1][0] if number + 1 < len(steps) else date.max
            calls = sum(
                seen.calls
                for day, all_seen in days.items()
                if since <= day < end
                for seen in all_seen
                if seen.units == units
            )
            change = calls * (units - before)
            more = "more" if change > 0 else "less"
            yield SpendWarning(
                WarningKind.PRICE_CHANGED,
                f"An image of {quality} costs {credits_words(units)} instead of "
                f"{credits_words(before)} since {day_words(since)} ({units / before - 1:+.1%}): "
                f"its {calls:,} calls since then came to {credits_words(abs(change))} {more}.",
                since,
                since,
                "Compare with the published price, and quote again before the next large run.",
                abs(change),
                quality,
            )


def _price_steps(days: Mapping[date, Sequence[PriceSeen]]) -> list[tuple[date, int]]:
    """Return the days from which most calls were charged another price, and that price.

    A new price holds once enough calls were charged it, without a day of the former price between
    them; then it holds from the first of these calls.
    """
    steps: list[tuple[date, int]] = []
    since, units, calls = date.max, 0, 0
    for day in sorted(days):
        most = max(days[day], key=lambda seen: (seen.calls, seen.units))
        if not steps:
            steps.append((day, most.units))
        if most.units == steps[-1][1]:
            units = 0
            continue
        if most.units != units:
            since, units, calls = day, most.units, 0
        calls += most.calls
        if calls >= LEAST_CALLS:
            steps.append((since, units))
    return steps


def _new_failures(history: SpendHistory, today: date) -> Iterator[SpendWarning]:
    if not history.days:
        return
    first = history.days[0].day
    counts: dict[str, dict[date, list[int]]] = defaultdict(dict)
    for seen in history.failures:
        if seen.day <= today:
            both = counts[seen.error_code].setdefault(seen.day, [0, 0])
            both[0] += seen.count
            both[1] += seen.units
    for code, days in sorted(counts.items()):
        last: date | None = None
        for day in sorted(days):
            never_before = last is None
            away = (day - (last or first)).days
            is_new = away >= (LEARNING_DAYS if never_before else AWAY_DAYS)
            if not is_new:
                last = day
                continue
            if days[day][0] < LEAST_FAILURES:
                continue  # too few to be new; the next day may have more
            last = day
            week = [days[other] for other in days if 0 <= (other - day).days < 7]
            count, units = sum(part[0] for part in week), sum(part[1] for part in week)
            until = max(other for other in days if 0 <= (other - day).days < 7)
            yield SpendWarning(
                WarningKind.FAILURE_NEW,
                f"{count:,} purchases ended with {code} {on_days(day, until)}, which "
                + ("was never seen before" if never_before else f"was not seen for {away} days")
                + f"; they cost, or may cost, {credits_words(units)}.",
                day,
                until,
                "`krea-dagster spend --by error_code --by run_id` shows the runs.",
                units,
                code,
            )


def _many_failures(days: Sequence[DaySpend], today: date) -> Iterator[SpendWarning]:
    """Find days with far more failures than usual; consecutive days are one warning."""
    usual: list[DaySpend] = []
    open_days: list[DaySpend] = []
    usual_share = 0.0
    for day in days:
        if day.day > today:
            break
        if open_days and (day.day - open_days[-1].day).days > 1:
            yield _failing(open_days, usual_share)
            open_days = []
        window = [past for past in usual[-WINDOW_DAYS:] if past.asked]
        asked = sum(past.asked for past in window)
        learning = not usual or (day.day - usual[0].day).days < LEARNING_DAYS
        if not learning and asked and day.asked:
            share = sum(past.trouble for past in window) / asked
            # Even without any earlier failure, one in a thousand is usual.
            deviation = sqrt(max(share, 0.001) * (1 - share) / day.asked)
            limit = share + max(TROUBLE_DEVIATIONS * deviation, TROUBLE_POINTS)
            if day.trouble / day.asked > limit and day.trouble >= LEAST_TROUBLE:
                usual_share = usual_share if open_days else share
                open_days.append(day)
                continue
        if open_days:
            yield _failing(open_days, usual_share)
            open_days = []
        usual.append(day)
    if open_days:
        yield _failing(open_days, usual_share)


def _failing(days: Sequence[DaySpend], usual_share: float) -> SpendWarning:
    asked, trouble = sum(day.asked for day in days), sum(day.trouble for day in days)
    units = sum(day.at_stake_units for day in days)
    since, until = days[0].day, days[-1].day
    return SpendWarning(
        WarningKind.FAILURES_HIGH,
        f"{trouble:,} of {asked:,} purchases ({trouble / asked:.0%}) {on_days(since, until)} "
        f"brought no image; {usual_share:.1%} is usual. {credits_words(units)} are at stake.",
        since,
        until,
        "See the failures by error code; `krea-dagster salvage` fetches paid images.",
        units,
    )
