"""The command ``prune``."""

from __future__ import annotations

from datetime import timedelta

import click

from krea_dagster.cli.options import json_option, open_krea, project_options
from krea_dagster.cli.terminal import out, show_json


@click.command("prune")
@project_options
@click.option(
    "--events-older-than-days",
    "days",
    type=click.IntRange(min=1),
    required=True,
    metavar="N",
    help="Prune images that were stored at least N days ago and have not changed since.",
)
@json_option
def prune_command(*, days: int, as_json: bool) -> None:
    """Remove events and callbacks of images stored long ago from the journal.

    Requests, purchases and charges stay, and every event that an account is made from: spend and
    verify say the same as before, and nothing is bought again. Works while runs buy. A database
    uses the space again; a SQLite file becomes smaller only by VACUUM.
    """
    pruned = open_krea(reads_values=False).prune_events(timedelta(days=days))
    if as_json:
        show_json(
            {
                "requests": pruned.requests,
                "events": pruned.events,
                "callbacks": pruned.callbacks,
            }
        )
    else:
        out.print(
            f"{pruned.events} events of {pruned.requests} images removed, and callbacks for "
            f"{pruned.callbacks}."
        )
