"""The small chart of the last weeks' credits that an asset shows in its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, timedelta
from typing import Final

import svg

from krea_dagster.spend.report.charts import svg_text
from krea_dagster.spend.tables.sql import DuckDB, units_of
from krea_dagster.spend.text import amount, day_words

#: Days that are drawn, up to the last with purchases.
DAYS: Final = 60

_WIDTH: Final = 480
_HEIGHT: Final = 150
_TOP: Final = 46
_BASE: Final = 126

# A separate image: it follows the browser's light or dark mode, not the page's.
_STYLE: Final = (
    "text{font:12px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#5b5a55}"
    ".b{font-weight:600;font-size:15px;fill:#1a1a18}.p{fill:#fcfbf8}.c{fill:#1d5b8f}"
    ".l{stroke:#8a8880;stroke-width:1}"
    "@media(prefers-color-scheme:dark){text{fill:#a8a69f}.b{fill:#ebe9e4}.p{fill:#14161a}"
    ".c{fill:#74b3e3}}"
)


def days_of(duck: DuckDB) -> dict[date, int]:
    """Return the units that were charged on each day."""
    found = duck.execute("SELECT day, credits_charged FROM spend_by_day").fetchall()
    return {day: units_of(credits) for day, credits in found}


def spend_sparkline(by_day: Mapping[date, int]) -> bytes:
    """Return an SVG of the units charged on each of the last 60 days; under 20 KB, no script."""
    elements: list[svg.Element] = [
        svg.Style(text=_STYLE),
        svg.Rect(width=_WIDTH, height=_HEIGHT, class_=["p"]),
    ]
    if by_day:
        elements += _bars(by_day)
    else:
        elements.append(svg_text(16, 28, "No purchases yet", "b"))
    label = elements[2].text if isinstance(elements[2], svg.Text) else ""
    image = svg.SVG(
        width=_WIDTH,
        height=_HEIGHT,
        viewBox=svg.ViewBoxSpec(0, 0, _WIDTH, _HEIGHT),
        xmlns="http://www.w3.org/2000/svg",
        elements=elements,
        extra={"role": "img", "aria-label": label or ""},
    )
    return str(image).encode()


def _bars(by_day: Mapping[date, int]) -> list[svg.Element]:
    last = max(by_day)
    first = max(min(by_day), last - timedelta(days=DAYS - 1))
    count = (last - first).days + 1
    days = [first + timedelta(days=number) for number in range(count)]
    month = sum(units for day, units in by_day.items() if day >= last.replace(day=1))
    most = max(by_day.get(day, 0) for day in days)
    step = (_WIDTH - 32) / max(count, 14)
    steps: list[svg.PathData] = []
    for number, day in enumerate(days):
        height = round((_BASE - _TOP) * by_day.get(day, 0) / most, 1) if most else 0
        if height:
            left = round(16 + number * step, 1)
            steps += [svg.M(left, _BASE), svg.v(-height), svg.h(round(step * 0.8, 1)), svg.V(_BASE)]
    end = round(16 + count * step, 1)
    parts: list[svg.Element] = [
        svg_text(16, 28, f"{amount(month)} credits in {last:%B %Y}", "b"),
        svg.Path(d=steps, class_=["c"]),
        svg.Line(x1=16, x2=end, y1=_BASE, y2=_BASE, class_=["l"]),
        svg_text(16, 143, day_words(first)),
    ]
    if end > 200:
        parts.append(svg_text(end, 143, day_words(last), anchor="end"))
    if most:
        parts.append(svg_text(_WIDTH - 16, 28, f"highest day {amount(most)}", anchor="end"))
    return parts
