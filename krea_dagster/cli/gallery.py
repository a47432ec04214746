"""The command ``krea-dagster gallery``."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from krea_dagster.curation.options import (
    journal_option,
    json_option,
    open_verdicts,
    partition_option,
    storage_option,
    where_option,
)
from krea_dagster.engine.storage.page import write_page
from krea_dagster.errors import ConfigError

if TYPE_CHECKING:
    from krea_dagster.curation.gallery.page import GallerySummary
    from krea_dagster.engine.storage.storage import Storage

_EPILOG: Final = """
\b
Environment:
  KREA_STORAGE      storage root    [data/krea]
  KREA_JOURNAL_URL  SQLAlchemy URL  [SQLite in the storage root]

\b
  krea-dagster gallery --partition bucket-000
  krea-dagster gallery --where campaign=autumn --verdict keep -o autumn.html

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
@storage_option
@journal_option
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
    storage: str,
    journal_url: str,
    partitions: tuple[str, ...],
    where: tuple[str, ...],
    statuses: tuple[str, ...],
    verdicts: tuple[str, ...],
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
    from krea_dagster.curation.gallery.filter import GalleryFilter, select_rows
    from krea_dagster.curation.gallery.page import estimate_bytes, write_gallery
    from krea_dagster.engine.storage.storage import Storage

    filters = GalleryFilter(
        partitions=partitions,
        where=parse_filters(where),
        statuses=() if "any" in statuses else statuses or ("stored",),
        verdicts=verdicts,
        limit=limit,
    )
    root = Storage(storage)
    chosen = select_rows(root, filters, _verdicts(root, journal_url, wanted=bool(verdicts)))
    if not chosen.matched:
        raise ConfigError(
            "no row matches the filter. Remove a --where, --verdict or --partition, or use "
            "--status any"
        )
    about = min(estimate_bytes(root, chosen.rows, pixels), round(most_mb * 1e6))
    click.echo(
        f"{len(chosen.rows):,} of {chosen.matched:,} rows, about {about / 1e6:.1f} MB", err=True
    )
    with tempfile.TemporaryFile() as page:
        written = write_gallery(
            root,
            chosen,
            page,
            title=title,
            filter_text=filters.words(),
            side=pixels,
            most_bytes=round(most_mb * 1e6),
            on_progress=_show_progress if sys.stderr.isatty() else lambda _: None,
        )
        page.seek(0)
        write_page(output, page.read(), "the gallery")
    _print_summary(output, written, as_json=as_json)
    if written.missing:
        sys.exit(1)


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


def _show_progress(done: int) -> None:
    if done % 50 == 0:
        click.echo(f"\r{done:,} images", nl=False, err=True)


def _verdicts(storage: Storage, journal_url: str, *, wanted: bool) -> dict[str, str]:
    """Return the current verdicts by sha256. Raises ConfigError where wanted ones are missing."""
    with open_verdicts(storage, journal_url) as log:
        if log is not None:
            return {sha256: one.verdict for sha256, one in log.current().items()}
    if wanted:
        raise ConfigError(
            "there is no journal to read verdicts from; set KREA_JOURNAL_URL, or omit --verdict"
        )
    return {}
