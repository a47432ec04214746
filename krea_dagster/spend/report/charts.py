"""The report's charts as SVG: spend by day, this month, cost per image.

Colours and fonts are in the page's style sheet, so that a chart follows light and dark mode. Each
chart is drawn at several widths, because text must not shrink with it.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import pairwise
from math import ceil, floor, log10
from typing import Final

import svg

from krea_dagster.models import UNITS_PER_CREDIT
from krea_dagster.spend.report.report_data import Period
from krea_dagster.spend.text import amount, day_words, rough
from krea_dagster.spend.warnings.forecast import Forecast, days_left
from krea_dagster.spend.warnings.run_out import RunOut

#: Widths in pixels at which a chart is drawn, by the class that shows it.
WIDTHS: Final = {"wide": 1040, "middle": 680, "narrow": 342}
_HEIGHTS: Final = {"wide": 300, "middle": 280, "narrow": 240}
_TOP: Final = 34
_BOTTOM: Final = 26
_RIGHT: Final = 10
#: Most days that are cut, and days from which on some are.
_MOST_CUT: Final = 4
_LEAST_FOR_CUT: Final = 14
#: Width of a letter in the chart, in pixels.
_LETTER: Final = 7.2


@dataclass(frozen=True)
class DayLabel:
    """A day with a label in the chart."""

    day: date
    text: str


@dataclass(frozen=True)
class BudgetMark:
    """A budget drawn as a line, in units."""

    name: str
    units: int


class _Plot:
    """A plot with a value axis from zero, and days as its other axis."""

    def __init__(self, size: str, start: date, end: date, most_units: float) -> None:
        self.size = size
        self.width, self.height = WIDTHS[size], _HEIGHTS[size]
        self.start, self.days = start, (end - start).days + 1
        self.ticks = _ticks(most_units / UNITS_PER_CREDIT, 4 if size == "narrow" else 5)
        self.top = self.ticks[-1] or 1.0
        longest = max(len(_tick_text(tick, self.ticks)) for tick in self.ticks)
        self.left = ceil(longest * _LETTER) + 8
        self.elements: list[svg.Element] = []
        self._axes()

    def x(self, day: date) -> float:
        """Return the left edge of a day."""
        inner = self.width - self.left - _RIGHT
        return round(self.left + inner * (day - self.start).days / self.days, 2)

    def middle(self, day: date) -> float:
        """Return the middle of a day."""
        return round(self.x(day) + self.step / 2, 2)

    @property
    def step(self) -> float:
        """The width of a day."""
        return (self.width - self.left - _RIGHT) / self.days

    def y(self, units: float) -> float:
        """Return the height of an amount."""
        inner = self.height - _TOP - _BOTTOM
        shown = min(units / UNITS_PER_CREDIT, self.top)
        return round(self.height - _BOTTOM - inner * shown / self.top, 2)

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        self.elements.append(svg_text(x, y, words, kind, anchor))

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        """Draw a straight line."""
        self.elements.append(svg.Line(x1=x1, y1=y1, x2=x2, y2=y2, class_=[kind]))

    def path(
        self, points: Sequence[tuple[float, float]], kind: str, *, close: bool = False
    ) -> None:
        """Draw a line through points, or the area inside them."""
        steps: list[svg.PathData] = [svg.M(*points[0]), *(svg.L(*point) for point in points[1:])]
        if close:
            steps.append(svg.Z())
        self.elements.append(svg.Path(d=steps, class_=[kind]))

    def _axes(self) -> None:
        for tick in self.ticks:
            y = self.y(tick * UNITS_PER_CREDIT)
            kind = "base" if tick == 0 else "grid"
            self.line(self.left, y, self.width - _RIGHT, y, kind)
            self.text(self.left - 7, y + 4, _tick_text(tick, self.ticks), anchor="end")
        for day, words in _dates(self.start, self.days, self.size):
            x = self.x(day)
            base = self.height - _BOTTOM
            self.line(x, base, x, base + 5, "base")
            self.text(x + 4, self.height - 7, words)

    def caps(self, caps: Sequence[BudgetMark]) -> None:
        """Draw the budgets that fit into the chart, with their names."""
        for cap in caps:
            if cap.units <= self.top * UNITS_PER_CREDIT:
                y = self.y(cap.units)
                self.line(self.left, y, self.width - _RIGHT, y, "cap")
                words = f"{cap.name} {amount(cap.units)}"
                self.text(self.left + 6, y - 6, words, "cap-name")

    def drawn(self, label: str) -> str:
        """Return the image; ``label`` describes it in a sentence."""
        return str(
            svg.SVG(
                viewBox=svg.ViewBoxSpec(0, 0, self.width, self.height),
                class_=["chart", self.size],
                elements=self.elements,
                extra={"role": "img", "aria-label": html.escape(label)},
            )
        )


def svg_text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> svg.Text:
    """Return text, escaped."""
    return svg.Text(
        x=round(x, 1),
        y=round(y, 1),
        text=html.escape(words),
        class_=[kind] if kind else None,
        extra={"text-anchor": anchor},
    )


def daily_chart(
    days: Sequence[Period], caps: Sequence[BudgetMark], labels: Sequence[DayLabel], label: str
) -> list[str]:
    """Draw credits by day as bars, at stake on top of charged, with the budgets and some labels.

    A few days far above the others are cut, and labelled.
    """
    start, end = min(days[0].start, days[-1].start - timedelta(days=6)), days[-1].start
    most = _most_shown(days)
    cut = [period for period in days if period.line.committed_units > most]
    is_cut = {period.start for period in cut}
    labels = [*map(_cut_label, cut), *(one for one in labels if one.day not in is_cut)]
    # A budget far above the bars would flatten them.
    near = [cap.units for cap in caps if cap.units <= 3 * most]
    images = []
    for size in WIDTHS:
        plot = _Plot(size, start, end, max([most, *near]))
        width = round(max(plot.step * (0.8 if plot.step > 4 else 0.9), 0.6), 2)
        for kind in ("charged", "stake"):
            bars = [_bar(plot, period, kind, width) for period in days]
            plot.elements.append(svg.Path(d=[part for bar in bars for part in bar], class_=[kind]))
        for period in cut:
            x, y = plot.x(period.start), plot.y(period.line.committed_units) + 14
            plot.line(x - 3, y, x + width + 3, y - 6, "cut")
        plot.caps(caps)
        _label(plot, labels, {period.start: period for period in days})
        if size == "wide":
            _tips(plot, days)
        images.append(plot.drawn(label))
    return images


def month_chart(
    days: Sequence[Period],
    today: date,
    caps: Sequence[BudgetMark],
    forecast: Forecast | None,
    label: str,
) -> list[str]:
    """Draw this month's credits added up by day, the month's budget, and the forecast."""
    start = today.replace(day=1)
    end = today + timedelta(days=days_left(today))
    by_day = {period.start: period.line.committed_units for period in days}
    total, sums = 0, []
    for number in range((today - start).days + 1):
        total += by_day.get(start + timedelta(days=number), 0)
        sums.append(total)
    high = forecast.high_units if forecast else total
    most = max([total, high, *(cap.units for cap in caps if cap.units <= 3 * max(total, high, 1))])
    images = []
    for size in WIDTHS:
        plot = _Plot(size, start, end, most)
        right = plot.width - _RIGHT
        here = (plot.x(today) + plot.step, plot.y(total))
        if forecast and today < end:
            low, mid, top = (
                plot.y(units)
                for units in (forecast.low_units, forecast.expected_units, forecast.high_units)
            )
            plot.path([here, (right, top), (right, low)], "range", close=True)
            plot.path([here, (right, mid)], "ahead")
            words = f"about {rough(forecast.expected_units)}"
            # Below the range at the place where the text begins.
            back = min(1.0, len(words) * _LETTER / (right - here[0]))
            below = low + (here[1] - low) * back + 18
            plot.text(right - 2, min(below, plot.height - _BOTTOM - 8), words, "strong", "end")
        points = [(plot.x(start), plot.y(0))]
        for number, units in enumerate(sums):
            points.append((plot.x(start + timedelta(days=number)) + plot.step, plot.y(units)))
        plot.path([*points, (here[0], plot.y(0))], "area", close=True)
        plot.path(points, "line")
        plot.caps(caps)
        images.append(plot.drawn(label))
    return images


def cost_chart(periods: Sequence[Period], days: int, label: str) -> list[str]:
    """Draw credits per accepted image, by periods of ``days`` days, as points on a line."""
    found = [
        (period.start + timedelta(days=days // 2), period.line.per_accepted_units)
        for period in periods
        if period.line.per_accepted_units is not None
    ]
    if not found:
        return []
    end = periods[-1].start + timedelta(days=max(days, 7) - 1)
    images = []
    for size in WIDTHS:
        plot = _Plot(size, periods[0].start, end, max(units for _, units in found) * 1.1)
        places = [(plot.middle(day), plot.y(units)) for day, units in found]
        plot.path(places, "line")
        for x, y in places:
            plot.elements.append(svg.Circle(cx=x, cy=y, r=3.5, class_=["dot"]))
        for number in sorted({0, len(found) - 1}):
            x, y = places[number]
            words = f"{found[number][1] / UNITS_PER_CREDIT:.4f}"
            is_last = number > 0
            plot.text(x, y - 12, words, "strong", "end" if is_last else "start")
        images.append(plot.drawn(label))
    return images


def balance_chart(
    readings: Sequence[tuple[date, int]], today: date, units: int, found: RunOut | None, label: str
) -> list[str]:
    """Draw what an account has left, and until when, as a range."""
    start = readings[0][0]
    ahead = max(28, (today - start).days)  # at most half of the chart
    latest = found and (found.latest or found.expected or found.earliest)
    end = min(max(latest or today, today + timedelta(days=6)), today + timedelta(days=ahead))
    images = []
    for size in WIDTHS:
        plot = _Plot(size, start, end, max(0, units, *(one for _, one in readings)))
        steps = [(plot.middle(day), plot.y(max(0, left))) for day, left in readings]
        here = (plot.middle(today), plot.y(max(0, units)))
        days = [found.earliest, found.latest, found.expected] if found else []
        ends = [_clipped(plot, here, day, today) for day in days]
        if ends:
            plot.path([here, *ends[:2], here], "range", close=True)
            plot.path([here, ends[2]], "ahead")
        plot.path([*steps, here], "line")
        plot.text(here[0] + 4, here[1] - 10, amount(units), "strong")
        images.append(plot.drawn(label))
    return images


def _clipped(
    plot: _Plot, here: tuple[float, float], day: date | None, today: date
) -> tuple[float, float]:
    """Return where a line from today to nothing on a day ends; at the chart's edge if later."""
    right = plot.width - _RIGHT
    if day is None:
        return right, here[1]
    x = plot.middle(today) + plot.step * (day - today).days
    base = plot.y(0)
    if x <= right:
        return x, base
    share = (right - here[0]) / (x - here[0])
    return right, here[1] + (base - here[1]) * share


def _most_shown(days: Sequence[Period]) -> int:
    """Return the highest amount that a chart of days shows: a few far above the others are cut."""
    units = sorted((period.line.committed_units for period in days), reverse=True)
    for count, (higher, lower) in enumerate(pairwise(units[: _MOST_CUT + 1]), start=1):
        if len(units) >= _LEAST_FOR_CUT and 0 < lower * 3 < higher:
            return units[count] * 3 // 2
    return units[0]


def _cut_label(period: Period) -> DayLabel:
    day, units = period.start, period.line.committed_units
    return DayLabel(day, f"{day.day} {day:%b}: {amount(units)}, bar cut")


def _bar(plot: _Plot, period: Period, kind: str, width: float) -> list[svg.PathData]:
    line = period.line
    low = 0 if kind == "charged" else line.charged_units
    high = line.charged_units if kind == "charged" else line.committed_units
    if high == low:
        return []
    x, bottom, top = plot.x(period.start), plot.y(low), plot.y(high)
    return [svg.M(x, bottom), svg.V(top), svg.h(width), svg.V(bottom), svg.Z()]


def _tips(plot: _Plot, days: Sequence[Period]) -> None:
    """Add a tooltip for each day; keyboard users have the table."""
    base = plot.height - _BOTTOM
    for period in days:
        units = period.line.committed_units
        if units:
            words = f"{day_words(period.start)}: {amount(units)} credits"
            plot.elements.append(
                svg.Rect(
                    x=plot.x(period.start),
                    y=_TOP,
                    width=round(plot.step, 2),
                    height=base - _TOP,
                    class_=["tip"],
                    elements=[svg.Title(text=html.escape(words))],
                )
            )


def _label(plot: _Plot, labels: Sequence[DayLabel], days: dict[date, Period]) -> None:
    """Label days above their bars; a label that would overlap an earlier one is left out."""
    taken: list[tuple[float, float, float]] = []
    for mark in labels:
        period = days.get(mark.day)
        if period is None:
            continue
        x, y = plot.middle(mark.day), plot.y(period.line.committed_units)
        y = max(y, _TOP + 4)
        width = len(mark.text) * _LETTER
        to_left = x + 8 + width > plot.width
        left = x - 8 - width if to_left else x + 8
        clash = any(
            left < to + 8 and left + width > at - 8 and abs(y - up) < 16 for at, to, up in taken
        )
        if clash or left < plot.left:
            continue
        taken.append((left, left + width, y))
        plot.text(
            x - 6 if to_left else x + 6, y + 5, mark.text, "strong", "end" if to_left else "start"
        )


def _ticks(most: float, count: int) -> list[float]:
    """Return round numbers from zero to the first that is not below ``most``."""
    if most <= 0:
        return [0.0, 1.0]
    rough = most / count
    power = 10.0 ** floor(log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [step * number for number in range(ceil(most / step - 1e-9) + 1)]


def _tick_text(tick: float, ticks: Sequence[float]) -> str:
    step = ticks[1]
    places = 0 if step >= 1 and step == int(step) else 1 if step * 10 == int(step * 10) else 2
    return f"{tick:,.{places}f}" if tick else "0"


def _dates(start: date, days: int, size: str) -> list[tuple[date, str]]:
    """Return the days that are labelled under the chart, with their labels."""
    every = [start + timedelta(days=number) for number in range(days)]
    if days <= 7:
        chosen = every[::-2] if size == "narrow" else every[::-1]
        return [(day, f"{day.day} {day:%b}") for day in chosen]
    if days <= 45:
        step = {"wide": 3, "middle": 5, "narrow": 8}[size]
        chosen = [day for number, day in enumerate(every[:-1]) if number % step == 0]
        return [
            (day, f"{day.day} {day:%b}" if number == 0 or day.day <= step else f"{day.day}")
            for number, day in enumerate(chosen)
        ]
    firsts = [day for day in every[: -days // 40 or None] if day.day == 1]
    room = {"wide": 24, "middle": 13, "narrow": 6}[size]
    step = next(
        months for months in (1, 2, 3, 4, 6, 12, 24, 48, 96) if len(firsts) <= months * room
    )
    chosen = [day for day in firsts if (day.month - 1 + 12 * day.year) % step == 0] or firsts[:1]
    return [
        (
            day,
            f"{day:%b %Y}"
            if number == 0 and size == "wide"
            else f"{day:%Y}"
            if day.month == 1
            else f"{day:%b}",
        )
        for number, day in enumerate(chosen)
    ]
