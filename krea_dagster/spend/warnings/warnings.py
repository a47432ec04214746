"""Finds what the person who pays must know: budgets, forecast, odd days, prices, failures. Pure.

Every finding about the past rests on the days before it only, so that a year read at its end
says what each day's look would have said.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from enum import Enum
from math import sqrt
from statistics import median
from typing import Final

from krea_dagster.engine.budget import PUBLISHED_UNITS
from krea_dagster.models import UNITS_PER_CREDIT
from krea_dagster.spend.warnings.anomaly import (
    LEARNING_DAYS,
    LEAST_ACTIVE,
    LEAST_PEERS,
    WINDOW_DAYS,
    Anomaly,
    anomalous_days,
    days_left,
    far_above,
    find_anomalies,
    forecast_month,
)
from krea_dagster.spend.warnings.history import (
    AccountUse,
    BudgetUse,
    DaySpend,
    PriceSeen,
    SpendHistory,
    credits_words,
    day_words,
    rough,
)

#: Share of a budget from which it is said that it runs out.
NEARLY_USED: Final = 0.8
#: How far, as a share of the cap, a month may be ahead of its days before it is said.
AHEAD_OF_DAYS: Final = 0.1
#: Calls that must have cost a new price, so that it counts as one.
LEAST_CALLS: Final = 3
#: Failures of a code in a day that make it a class, and days that it must have been away.
LEAST_FAILURES: Final = 3
AWAY_DAYS: Final = 90
#: Standard deviations by which the share of failures must pass its habit, and percentage points.
TROUBLE_DEVIATIONS: Final = 6.0
TROUBLE_POINTS: Final = 0.05
#: Purchases of a day that must have brought no image.
LEAST_TROUBLE: Final = 5
#: Excess from which an odd day or partition is worth a word: one credit.
LEAST_EXCESS_UNITS: Final = UNITS_PER_CREDIT
#: Excess of a partition that is worth a word, as a share of what a whole day usually costs.
LEAST_PARTITION_SHARE: Final = 0.25
#: The published price of the dearest image, where none was seen.
DEAREST_UNITS: Final = max(PUBLISHED_UNITS.values())


class WarningKind(str, Enum):
    """What can be found. The text is what ``--json`` and the check's name show."""

    ACCOUNT_DIFFERS = "account_differs"
    BUDGET_USED = "budget_used"
    FORECAST = "forecast"
    DAY_OUT_OF_HABIT = "day_out_of_habit"
    PARTITION_OUT_OF_HABIT = "partition_out_of_habit"
    PRICE_CHANGED = "price_changed"
    FAILURE_NEW = "failure_new"
    FAILURES_HIGH = "failures_high"


class Level(str, Enum):
    """Whether the books are wrong, or somebody should look."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True)
class SpendWarning:
    """One finding: a sentence with its figures, since when, and what to do.

    ``until`` is the last day that it was seen on; ``units`` the money in question. ``about`` is
    the partition, quality, error code or budget that it is about, empty where it is about all.
    """

    kind: WarningKind
    text: str
    since: date
    until: date
    advice: str
    units: int = 0
    about: str = ""

    @property
    def level(self) -> Level:
        """An account that disagrees is an error; the rest are warnings."""
        error = self.kind is WarningKind.ACCOUNT_DIFFERS
        return Level.ERROR if error else Level.WARNING


def find_warnings(history: SpendHistory, now: datetime) -> list[SpendWarning]:
    """Find all warnings up to ``now``: errors first, then the latest first.

    Those about budgets and the forecast are about today and this month; the others about any
    day of the history.
    """
    today = now.astimezone(timezone.utc).date()
    spent = {day.day: day.committed_units for day in history.days if day.day <= today}
    grain_units = max((seen.units for seen in history.prices), default=DEAREST_UNITS)
    odd = [
        one
        for one in find_anomalies(spent, today, grain_units)
        if one.excess_units >= LEAST_EXCESS_UNITS
    ]
    found = [
        *_account(history.account, today),
        *_budgets(history.budgets, today, now),
        *_forecast(history.budgets, spent, today, anomalous_days(odd)),
        *_odd_days(history, odd),
        *_odd_partitions(history, today, anomalous_days(odd), grain_units),
        *_prices(history.prices, today),
        *_new_failures(history, today),
        *_many_failures(history.days, today),
    ]
    order = list(WarningKind)
    found.sort(key=lambda one: (-one.until.toordinal(), order.index(one.kind), one.about))
    return sorted(found, key=lambda one: one.level is not Level.ERROR)


def _account(account: AccountUse | None, today: date) -> Iterator[SpendWarning]:
    if account is None or account.unexplained_units == 0:
        return
    units = account.unexplained_units
    how = "more than the journal explains" if units > 0 else "less than the journal has charged"
    yield SpendWarning(
        WarningKind.ACCOUNT_DIFFERS,
        f"The account used {credits_words(account.used_units)}, {credits_words(abs(units))} {how}.",
        account.since,
        today,
        "See whether the key is used elsewhere, then run `krea-dagster verify`.",
        abs(units),
    )


def _budgets(uses: Sequence[BudgetUse], today: date, now: datetime) -> Iterator[SpendWarning]:
    month_days = today.day + days_left(today)
    moment = now.astimezone(timezone.utc)
    hours = moment.hour + moment.minute / 60
    for use in uses:
        if use.parse_cap <= 0:
            share = float("inf") if use.used_units else 0.0
        else:
            share = use.used_units / use.parse_cap
        elapsed = (today.day - 1 + hours / 24) / month_days
        ahead = use.period == "month" and share > elapsed + AHEAD_OF_DAYS
        if share < NEARLY_USED and not ahead:
            continue
        if use.period == "month" and share < 1 and not ahead:
            continue  # nearly used when it is nearly over is what a month's budget is for
        of = "" if share == float("inf") else f" ({share:.0%})"
        name = {"day": day_words(today), "month": f"{today:%B %Y}", "total": use.name}[use.period]
        text = (
            f"{credits_words(use.used_units)} of {credits_words(use.parse_cap)}{of} of the "
            f"budget for {name} are used"
        )
        if use.period == "month":
            text += f", with {elapsed:.0%} of the month gone"
        yield SpendWarning(
            WarningKind.BUDGET_USED,
            f"{text}.",
            today.replace(day=1) if use.period == "month" else today,
            today,
            "Ask for less, or raise the budget; `krea-dagster spend` shows where it went.",
            use.used_units,
            use.name,
        )


def _forecast(
    uses: Sequence[BudgetUse], spent: Mapping[date, int], today: date, leave_out: frozenset[date]
) -> Iterator[SpendWarning]:
    forecast = forecast_month(spent, today, leave_out)
    caps = [use for use in uses if use.period == "month"]
    if forecast is None:
        return
    for use in caps:
        if forecast.expected_units <= use.parse_cap:
            continue
        sure = "almost surely" if forecast.low_units > use.parse_cap else "probably"
        yield SpendWarning(
            WarningKind.FORECAST,
            f"{today:%B %Y} will {sure} pass its budget of {credits_words(use.parse_cap)}: "
            f"about {rough(forecast.expected_units)} are expected by its end, "
            f"{rough(forecast.low_units)} to {rough(forecast.high_units)} nine times in ten.",
            today,
            today,
            "Hold back what can wait, or set a hard budget, which defers rows before they cost.",
            forecast.expected_units - use.parse_cap,
            use.name,
        )


def _odd_days(history: SpendHistory, odd: Sequence[Anomaly]) -> Iterator[SpendWarning]:
    for one in odd:
        times = f", {one.units / one.expected_units:.1f} times" if one.expected_units else ","
        yield SpendWarning(
            WarningKind.DAY_OUT_OF_HABIT,
            f"{credits_words(one.units)} {_on(one.since, one.until)}{times} the "
            f"{credits_words(one.expected_units)} that are usual{_mostly(history, one)}.",
            one.since,
            one.until,
            "`krea-dagster spend --by run_id` says which run it was; a day's budget "
            "would have stopped it.",
            one.excess_units,
        )


def _mostly(history: SpendHistory, one: Anomaly) -> str:
    """The partition that most of it went to, where there is one."""
    sums: dict[str, int] = defaultdict(int)
    for part in history.partitions:
        if one.since <= part.day <= one.until:
            sums[part.partition_key] += part.committed_units
    name, units = max(sums.items(), key=lambda item: item[1], default=("", 0))
    return f"; {credits_words(units)} of it for partition {name}" if units * 2 > one.units else ""


def _odd_partitions(
    history: SpendHistory, today: date, odd: frozenset[date], grain_units: int
) -> Iterator[SpendWarning]:
    """Partitions out of their habit, but for days that were odd as a whole and said so.

    A partition with purchases on few days has no habit of its own: it is held against the others
    like it, by what they cost in all.
    """
    by_key: dict[str, dict[date, int]] = defaultdict(dict)
    for part in history.partitions:
        if part.day <= today:
            days = by_key[part.partition_key]
            days[part.day] = days.get(part.day, 0) + part.committed_units
    found: list[tuple[str, Anomaly]] = []
    short: list[tuple[date, str, int]] = []
    for key, days in sorted(by_key.items()):
        if len(days) < LEAST_ACTIVE:
            short.append((min(days), key, sum(days.values())))
        else:
            found += [(key, one) for one in find_anomalies(days, today, grain_units)]
    peers: list[int] = []
    for since, key, units in sorted(short):
        usual = peers[-WINDOW_DAYS:]
        if len(usual) >= LEAST_PEERS and far_above(units, usual, grain_units):
            found.append((key, Anomaly(since, max(by_key[key]), units, int(median(usual)))))
        else:
            peers.append(units)
    least_units = LEAST_EXCESS_UNITS
    if sums := [day.committed_units for day in history.days if day.committed_units]:
        least_units = max(least_units, int(LEAST_PARTITION_SHARE * median(sums)))
    for key, one in found:
        is_said = any(
            one.since + timedelta(days=number) in odd
            for number in range((one.until - one.since).days + 1)
        )
        if one.excess_units >= least_units and not is_said:
            yield _partition(key, one)


def _partition(key: str, one: Anomaly) -> SpendWarning:
    return SpendWarning(
        WarningKind.PARTITION_OUT_OF_HABIT,
        f"Partition {key} cost {credits_words(one.units)} {_on(one.since, one.until)}; "
        f"{credits_words(one.expected_units)} are usual.",
        one.since,
        one.until,
        "See whether its rows are what was meant; a budget for partitions would stop it.",
        one.excess_units,
        key,
    )


def _prices(prices: Sequence[PriceSeen], today: date) -> Iterator[SpendWarning]:
    """The price that most calls of a day were charged, against that of the days before."""
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
    """From which day on most calls were charged which price.

    A price holds once enough calls have cost it with none of the former price's days between,
    and then from the first of them on.
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
                continue  # one of a kind is no class yet: the next day may make it one
            last = day
            week = [days[one] for one in days if 0 <= (one - day).days < 7]
            count, units = sum(one[0] for one in week), sum(one[1] for one in week)
            until = max(one for one in days if 0 <= (one - day).days < 7)
            yield SpendWarning(
                WarningKind.FAILURE_NEW,
                f"{count:,} purchases ended with {code} {_on(day, until)}, which "
                + ("was never seen before" if never_before else f"was not seen for {away} days")
                + f"; they cost, or may cost, {credits_words(units)}.",
                day,
                until,
                "`krea-dagster spend --by error_code --by run_id` says whose they are.",
                units,
                code,
            )


def _many_failures(days: Sequence[DaySpend], today: date) -> Iterator[SpendWarning]:
    """Days with far more failures than usual, days in a row together."""
    usual: list[DaySpend] = []
    open_days: list[DaySpend] = []
    habit = 0.0
    for day in days:
        if day.day > today:
            break
        if open_days and (day.day - open_days[-1].day).days > 1:
            yield _failing(open_days, habit)
            open_days = []
        window = [one for one in usual[-WINDOW_DAYS:] if one.asked]
        asked = sum(one.asked for one in window)
        learning = not usual or (day.day - usual[0].day).days < LEARNING_DAYS
        if not learning and asked and day.asked:
            share = sum(one.trouble for one in window) / asked
            # A habit of no failure at all still allows for one in a thousand.
            deviation = sqrt(max(share, 0.001) * (1 - share) / day.asked)
            limit = share + max(TROUBLE_DEVIATIONS * deviation, TROUBLE_POINTS)
            if day.trouble / day.asked > limit and day.trouble >= LEAST_TROUBLE:
                habit = habit if open_days else share
                open_days.append(day)
                continue
        if open_days:
            yield _failing(open_days, habit)
            open_days = []
        usual.append(day)
    if open_days:
        yield _failing(open_days, habit)


def _failing(days: Sequence[DaySpend], habit: float) -> SpendWarning:
    asked, trouble = sum(day.asked for day in days), sum(day.trouble for day in days)
    units = sum(day.at_stake_units for day in days)
    since, until = days[0].day, days[-1].day
    return SpendWarning(
        WarningKind.FAILURES_HIGH,
        f"{trouble:,} of {asked:,} purchases ({trouble / asked:.0%}) {_on(since, until)} brought "
        f"no image; {habit:.1%} is usual. {credits_words(units)} are at stake.",
        since,
        until,
        "Look at the failures by class; `krea-dagster salvage` fetches what is paid for.",
        units,
    )


def _on(since: date, until: date) -> str:
    if since == until:
        return f"on {day_words(since)}"
    return f"from {day_words(since)} to {day_words(until)}"
