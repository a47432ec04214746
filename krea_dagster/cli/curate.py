"""The command ``krea-dagster curate``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from krea_dagster.cli.options import json_option, open_krea, project_options
from krea_dagster.cli.terminal import err, out, show_json

if TYPE_CHECKING:
    from krea_dagster.application.curation import Curated


@click.command("curate")
@project_options
@click.option(
    "--accept",
    multiple=True,
    metavar="MEASURE>=VALUE",
    help="A bound of a measure that accepted images must meet; repeatable.",
)
@click.option(
    "--require-keep",
    is_flag=True,
    help="Accept only images that a person has kept; otherwise all but rejected and flagged ones.",
)
@click.option(
    "--one-of-duplicates", is_flag=True, help="Accept only the best of near-duplicate images."
)
@click.option(
    "--wanted",
    multiple=True,
    metavar="WHAT=N",
    help="Accept this number: prompt=3, column:NAME=500 or column:NAME:VALUE=20; repeatable.",
)
@json_option
def curate_command(
    *,
    accept: Sequence[str],
    require_keep: bool,
    one_of_duplicates: bool,
    wanted: Sequence[str],
    as_json: bool,
) -> None:
    """Measure the stored images, find duplicates, and write the table of accepted images.

    What Dagster's job krea_dataset does, for all partitions: a project of Dagster with rules of its
    own needs the same ones here. Measures that are known are kept. Buys nothing, and needs no
    network where the storage root is a folder.
    """
    from krea_dagster.application.curation import Curation

    curation = Curation(
        accept=accept,
        require_keep=require_keep,
        one_of_duplicates=one_of_duplicates,
        wanted=wanted,
    )
    curated = open_krea().curate(curation)
    figures = _figures(curated)
    for part in curated.measured:
        for failure in part.failures:
            err.print(f"{part.partition_key}: {failure}", markup=False)
    if as_json:
        show_json(figures)
    else:
        _show(figures)


def _figures(curated: Curated) -> dict[str, Any]:
    reasons: Counter[str] = sum((one.reasons for one in curated.accepted), Counter())
    return {
        "partitions": len(curated.accepted),
        "images": curated.duplicates.images,
        "measured_now": sum(part.read for part in curated.measured),
        "not_measured": sum(len(part.failures) for part in curated.measured),
        "copies": curated.duplicates.copies.exact + curated.duplicates.copies.near,
        "accepted": sum(one.accepted for one in curated.accepted),
        "rows_by_reason": dict(sorted(reasons.items())),
        "wanted": [
            {"name": one.name, "wanted": one.wanted, "accepted": one.accepted, "why": one.why}
            for one in curated.outcomes
        ],
    }


def _show(figures: dict[str, Any]) -> None:
    out.print(f"images     {figures['images']}, {figures['measured_now']} of them measured now")
    out.print(f"copies     {figures['copies']}")
    reasons = ", ".join(f"{count} {reason}" for reason, count in figures["rows_by_reason"].items())
    out.print(f"rows       {reasons or 'none'}", markup=False)
    for one in figures["wanted"]:
        line = f"wanted     {one['name']}: {one['accepted']} of {one['wanted']}"
        out.print(f"{line}: {one['why']}" if one["why"] else line, markup=False)
