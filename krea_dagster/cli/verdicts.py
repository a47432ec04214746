"""The commands ``verdicts export`` and ``verdicts import``."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from krea_dagster.cli.options import json_option, open_krea, project_options
from krea_dagster.cli.terminal import out, show_json

#: Images that are not here, of which the command names this many.
_SHOWN: Final = 5


@click.group("verdicts")
def verdicts_group() -> None:
    """Write the verdicts of reviewers to a file, or read them from files: CSV or Parquet.

    A row has image_sha256, prompt_id, sample, request_key, verdict (keep, reject, flag, none),
    reason, reviewer, reviewed_at (UTC), tags (separated by semicolons in CSV) and note.
    """


@verdicts_group.command("export")
@project_options
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--history", is_flag=True, help="Every verdict that was given, not only those that count."
)
@json_option
def export_command(*, file: Path, history: bool, as_json: bool) -> None:
    """Write the verdicts to FILE (.csv or .parquet), each with its image, tags and note.

    In CSV a text that a spreadsheet would take for a formula has an apostrophe in front, which the
    import takes off. The encoding is UTF-8.
    """
    rows = open_krea(reads_values=False).export_verdicts(file, history=history)
    if as_json:
        show_json({"file": str(file), "rows": rows})
    else:
        click.echo(f"{rows} {'row' if rows == 1 else 'rows'} in {file}")


@verdicts_group.command("import")
@project_options
@click.argument(
    "files",
    nargs=-1,
    required=True,
    metavar="FILE...",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option("--reviewer", default="", metavar="NAME", help="Reviewer of rows that name none.")
@json_option
def import_command(*, files: tuple[Path, ...], reviewer: str, as_json: bool) -> None:
    """Add the verdicts of files to the journal: of all rows, or of none if one is wrong.

    A row says which image it is about by image_sha256, by request_key, or by prompt_id and sample.
    On each image the last verdict by time counts: older ones are left out, as are rows that are
    here already and images that are not. A row without reviewed_at is from now. Without a column
    tags or note these stay as they are.
    """
    done = open_krea(reads_values=False).import_verdicts(files, reviewer=reviewer)
    if as_json:
        show_json(
            {
                "rows": done.rows,
                "added": done.added,
                "already_here": done.known,
                "older": done.older,
                "unknown_images": len(done.unknown),
            }
        )
        return
    out.print(f"rows           {done.rows}")
    out.print(f"added          {done.added}")
    out.print(f"already here   {done.known}")
    out.print(f"older          {done.older}, left out")
    out.print(f"unknown        {len(done.unknown)} images, left out")
    for line in done.unknown[:_SHOWN]:
        click.echo(f"This project has no such image: {line}", err=True)
    if len(done.unknown) > _SHOWN:
        click.echo(f"… and {len(done.unknown) - _SHOWN} more.", err=True)
