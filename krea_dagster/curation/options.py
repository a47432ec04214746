"""Options that the commands of this folder share, and the verdicts they read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from krea_dagster.engine.journal.verdict_log import VerdictLog
    from krea_dagster.engine.storage.storage import Storage

storage_option = click.option(
    "--storage",
    envvar="KREA_STORAGE",
    default="data/krea",
    show_default=True,
    help="The storage root of the images.",
)
journal_option = click.option(
    "--journal",
    "journal_url",
    envvar="KREA_JOURNAL_URL",
    default="",
    metavar="URL",
    help="The journal, if it is not in the storage root.",
)
partition_option = click.option(
    "--partition",
    "partitions",
    multiple=True,
    metavar="KEY",
    help="Only this partition; repeatable.",
)
where_option = click.option(
    "--where",
    multiple=True,
    metavar="COLUMN=VALUE",
    help="Only rows with this value; values of one column are alternatives. Repeatable.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print a summary as JSON to stdout."
)


@contextmanager
def open_verdicts(storage: Storage, journal_url: str) -> Iterator[VerdictLog | None]:
    """Open the verdicts of a journal, by default the one in the storage root; None without one."""
    from krea_dagster.engine.journal.database import database_in, has_database
    from krea_dagster.engine.journal.verdict_log import VerdictLog

    url = journal_url or ("" if storage.folder is None else database_in(storage))
    if not url or not has_database(url):
        yield None
        return
    log = VerdictLog.open(url)
    try:
        yield log
    finally:
        log.close()
