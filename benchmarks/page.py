"""Writes the page of results: docs/benchmarks.md. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from benchmarks.harness import Report, conditions_text

_HEAD: Final = """\
# Benchmarks

Written by `make bench`; do not edit by hand. Every figure comes from one run on one machine,
with the server (`benchmarks/server.py`, on this machine, with nothing of the package in it) on a
core of its own. Figures of other machines differ; ratios within one table hold better.

- `make bench` runs all of it in some 25 minutes, `make bench BENCH=quick` a short form in a few,
  which prints and writes nothing.
- `.venv/bin/python -m benchmarks NAME` runs one and replaces its part of this page. Each has
  `--help`.
"""


def page(reports: Sequence[dict[str, Any]]) -> str:
    """The page of these reports, as Report.as_json gives them."""
    return "\n".join([_HEAD, *(_part(values) for values in reports)])


def _part(values: dict[str, Any]) -> str:
    report = Report.from_json(values)
    lines = [f"## {report.title}", "", f"`benchmarks/{report.name}.py`. {report.setting}.", ""]
    if report.rows:
        lines += _table(report.columns, report.rows)
    if report.claims:
        lines += _table(
            ["limit", "measured", "at most", "met"],
            [
                [
                    claim.text,
                    f"{claim.value:.4g} {claim.unit}".strip(),
                    f"{claim.limit:g} {claim.unit}".strip(),
                    "yes" if claim.met else "**no**",
                ]
                for claim in report.claims
            ],
        )
    if report.notes:
        lines += [*(f"- {note}" for note in report.notes), ""]
    lines += [f"{conditions_text(values['conditions'])}; {report.seconds:g} s in all.", ""]
    return "\n".join(lines)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    aligned = ["---", *["---:"] * (len(columns) - 1)]
    lines = [columns, aligned, *rows]
    return [
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines),
        "",
    ]
