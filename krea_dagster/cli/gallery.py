"""The command ``krea-dagster gallery``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from krea_dagster.cli.options import (
    earlier_option,
    json_option,
    open_krea,
    partition_option,
    project_options,
    where_option,
)

if TYPE_CHECKING:
    from krea_dagster.curation.gallery.page import GallerySummary


_EPILOG: Final = """
\b
  krea-dagster gallery --partition bucket-000
  krea-dagster gallery --where campaign=autumn --verdict keep -o autumn.html
  krea-dagster gallery --verdict reject --by campaign

\b
Exit codes: 0 done, 1 some stored files are missing or changed (marked on the
page), 2 invalid usage or no matching rows.
"""


@click.command("gallery", epilog=_EPILOG)
@click.option(
    "-o",
    "--output",
    default="gallery.html",
    show_default=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file to write.",
)
@project_options
@partition_option
@where_option
@click.option(
    "--status",
    "statuses",
    multiple=True,
    metavar="STATUS",
    help="Only rows with this status, or `any`.  [default: stored]",
)
@click.option(
    "--verdict",
    "verdicts",
    multiple=True,
    type=click.Choice(["keep", "reject", "flag", "none"]),
    help="Only images with this verdict; none for images without one.",
)
@earlier_option
@click.option(
    "--by",
    default="partition_key",
    metavar="COLUMN",
    help="Column whose values are the sections.  [default: the partition]",
)
@click.option(
    "--limit",
    default=500,
    show_default=True,
    type=click.IntRange(min=1),
    help="Maximum number of rows.",
)
@click.option(
    "--pixels",
    default=320,
    show_default=True,
    type=click.IntRange(32, 1024),
    help="Longest side of the thumbnails.",
)
@click.option(
    "--most-mb",
    default=25.0,
    show_default=True,
    type=click.FloatRange(min=0.1),
    help="Maximum size of the file; the page counts the rows that do not fit.",
)
@click.option("--title", default="Gallery", show_default=True, help="The page's heading.")
@json_option
def gallery_command(
    *,
    output: Path,
    partitions: tuple[str, ...],
    where: tuple[str, ...],
    statuses: tuple[str, ...],
    verdicts: tuple[str, ...],
    earlier: bool,
    by: str,
    limit: int,
    pixels: int,
    most_mb: float,
    title: str,
    as_json: bool,
) -> None:
    """Write one HTML file with thumbnails, to look at or to send to a colleague.

    It shows prompt, seed, size, credits and ids of each image, and needs no network, other file or
    script. Files that are missing or have changed since they were verified are not shown.
    """
    from krea_dagster.curation.column_filter import parse_filters
    from krea_dagster.curation.gallery.filter import GalleryFilter

    filters = GalleryFilter(
        partitions=partitions,
        where=parse_filters(where),
        statuses=() if "any" in statuses else statuses or ("stored",),
        verdicts=verdicts,
        limit=limit,
        earlier=earlier,
        by=by,
    )
    written = open_krea().gallery(
        output,
        filters,
        title=title,
        side=pixels,
        most_bytes=round(most_mb * 1e6),
        on_selected=_print_estimate,
        on_progress=_print_progress if sys.stderr.isatty() else lambda _: None,
    )
    _print_summary(output, written, as_json=as_json)
    if written.missing:
        sys.exit(1)


def _print_estimate(rows: int, matched: int, size_bytes: int) -> None:
    click.echo(f"{rows:,} of {matched:,} rows, about {size_bytes / 1e6:.1f} MB", err=True)


def _print_summary(output: Path, written: GallerySummary, *, as_json: bool) -> None:
    if as_json:
        figures = {
            "path": str(output),
            "images": written.shown,
            "files_missing": written.missing,
            "rows_left_out": written.left_out,
            "bytes": written.size_bytes,
        }
        click.echo(json.dumps(figures))
        return
    click.echo(f"{output}: {written.shown:,} images, {written.size_bytes / 1e6:.1f} MB")
    if written.missing:
        click.echo(
            f"{written.missing:,} stored files are missing or changed and marked on the page; a "
            "run of images fetches those that EvoLink still has",
            err=True,
        )
    if written.left_out:
        click.echo(f"{written.left_out:,} more rows left out: --limit, --most-mb", err=True)


def _print_progress(done: int) -> None:
    if done % 50 == 0:
        click.echo(f"\r{done:,} images", nl=False, err=True)
