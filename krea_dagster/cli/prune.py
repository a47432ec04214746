"""The command ``prune``."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from krea_dagster.cli.options import json_option, open_krea, project_options
from krea_dagster.cli.terminal import out, show_json

if TYPE_CHECKING:
    from krea_dagster.application.pruning import PrunedImages
    from krea_dagster.engine.journal.prune import Pruned

#: Images that are named.
_NAMED = 20


@click.command("prune")
@project_options
@click.option("--rejected", is_flag=True, help="Files of images that were rejected in the review.")
@click.option(
    "--replaced",
    is_flag=True,
    help="Files of changed rows' images and of earlier attempts, whose successor is stored.",
)
@click.option("--unlisted", is_flag=True, help="Files of the images of rows that left the table.")
@click.option("--yes", is_flag=True, help="Remove the files, instead of only listing them.")
@click.option(
    "--events-older-than-days",
    "days",
    type=click.IntRange(min=1),
    metavar="N",
    help=(
        "Remove events and callbacks from the journal, of images that were stored at least N days "
        "ago and have not changed since. Needs no --yes."
    ),
)
@json_option
def prune_command(
    *,
    rejected: bool,
    replaced: bool,
    unlisted: bool,
    yes: bool,
    days: int | None,
    as_json: bool,
) -> None:
    """Remove the files of images that nothing needs, or old events from the journal.

    Without --yes it lists the images, and removes nothing. An image that a person kept, that is
    among the accepted images, or that the prompt table requests again is left alone. The journal
    keeps all else of a pruned image: spend and verify say the same as before, and it is neither
    fetched nor bought again. Where a row requests one later, `materialize --again pruned` buys
    another image. Thumbnails and exports stay.

    Events: requests, purchases and charges stay, and every event that an account is made from. A
    database uses the space again; a SQLite file becomes smaller only by VACUUM.
    """
    files = rejected or replaced or unlisted
    if not files and days is None:
        raise click.UsageError(
            "name what to prune: --rejected, --replaced, --unlisted or --events-older-than-days"
        )
    figures: dict[str, Any] = {}
    if files:
        done = open_krea().prune(
            rejected=rejected, replaced=replaced, unlisted=unlisted, dry_run=not yes
        )
        figures |= _figures(done)
        if not as_json:
            _show(done)
    if days is not None:
        pruned = open_krea(reads_values=False).prune_events(timedelta(days=days))
        figures |= _event_figures(pruned)
        if not as_json:
            out.print(
                f"{pruned.events} events of {pruned.requests} images removed, and callbacks for "
                f"{pruned.callbacks}."
            )
    if as_json:
        show_json(figures)


def _event_figures(pruned: Pruned) -> dict[str, Any]:
    return {
        "requests": pruned.requests,
        "events": pruned.events,
        "callbacks": pruned.callbacks,
    }


def _figures(done: PrunedImages) -> dict[str, Any]:
    return {
        "dry_run": done.dry_run,
        "images": [
            {**row, "stored_at": row["stored_at"].isoformat()} for row in done.images.to_pylist()
        ],
        "counts": dict(done.counts),
        "left": dict(done.left),
        "finished": done.finished,
        "files_before": done.files_before,
        "bytes_before": done.bytes_before,
        "files_after": done.files_after,
        "bytes_after": done.bytes_after,
    }


def _show(done: PrunedImages) -> None:
    rows = done.images.slice(0, _NAMED).to_pylist()
    for row in rows:
        name = row["prompt_id"] or f"request {row['request_key'][:12]}"
        sample = f" sample {row['sample']}" if row["sample"] else ""
        shape = f"{row['size']} {row['quality']}, attempt {row['attempt']}"
        out.print(
            f"{row['why']:<9} {name}{sample}: {shape}, {row['stored_at']:%Y-%m-%d}", markup=False
        )
    if done.images.num_rows > len(rows):
        out.print(f"… and {done.images.num_rows - len(rows):,} more (--json lists all)")
    tense = "would be" if done.dry_run else "were"
    counts = ", ".join(f"{count:,} {why}" for why, count in done.counts.items()) or "no"
    out.print(f"{counts} images {tense} pruned.")
    for why, count in done.left.items():
        out.print(f"{count:,} are left alone: {why}.", markup=False)
    if done.finished:
        out.print(f"{done.finished:,} files of an interrupted call {tense} removed, too.")
    out.print(
        f"images/: {done.files_before:,} files, {_megabytes(done.bytes_before)} before; "
        f"{done.files_after:,} files, {_megabytes(done.bytes_after)} after."
    )
    if done.dry_run and (done.images.num_rows or done.finished):
        out.print("Nothing was removed. Repeat the command with --yes to remove the files.")


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"
