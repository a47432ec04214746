"""The command that hands images on as a dataset."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from krea_dagster.curation.export.export import Exported
    from krea_dagster.curation.export.shards import ExportProgress
    from krea_dagster.engine.storage.storage import Storage

#: Seconds between two lines of progress.
_LINE_EVERY_S: Final = 5.0

_EPILOG: Final = """
\b
Environment:
  KREA_STORAGE      root of what is made                       [data/krea]
  KREA_JOURNAL_URL  SQLAlchemy URL        [SQLite in the storage root]
  KREA_PROMPTS      the prompt table, to be named in the card  [none]

\b
An export is a new version: a folder below --to that never changes. LATEST (and
the link latest) names the one that counts, and is written last. What has not
changed since the version before is linked, and what an interrupted export has
written is not written again.

\b
  datasets:    load_dataset("TO/latest")
  webdataset:  WebDataset("TO/latest/data/train-{00000..00012}.tar")

\b
Exit codes: 0 published, 1 images are missing or changed and nothing was
published, 2 wrong use or nothing to export.
"""


@click.command("export", epilog=_EPILOG)
@click.option(
    "--storage",
    envvar="KREA_STORAGE",
    default="data/krea",
    show_default=True,
    help="The storage root whose images are exported.",
)
@click.option(
    "--journal",
    "journal_url",
    envvar="KREA_JOURNAL_URL",
    default="",
    metavar="URL",
    help="The journal, where it is not in the storage root.",
)
@click.option(
    "--to",
    metavar="FOLDER|URL",
    help="Where versions are written.  [default: exports/FORMAT in the storage root]",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["parquet", "imagefolder", "webdataset", "jsonl", "csv"]),
    default="parquet",
    show_default=True,
    help=(
        "parquet (images inside) and imagefolder are for the library datasets, webdataset is tar "
        "shards; jsonl and csv are files and a plain table."
    ),
)
@click.option("--all", "everything", is_flag=True, help="All stored images, not only accepted.")
@click.option(
    "--partition", "partitions", multiple=True, metavar="KEY", help="Only these; repeatable."
)
@click.option(
    "--where",
    multiple=True,
    metavar="COLUMN=VALUE",
    help="Only rows with this value; of one column any of several, of several columns all.",
)
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="NAME",
    help="Hand this column on; repeatable.  [default: all that mean something elsewhere]",
)
@click.option(
    "--split",
    "splits",
    multiple=True,
    metavar="NAME=SHARE",
    help="A split and its share of the prompts, such as train=0.9; they sum to 1.  [train=1]",
)
@click.option(
    "--leaks",
    is_flag=True,
    help="Keep images that are alike in several splits; else only the last named split has them.",
)
@click.option(
    "--shard-images",
    type=click.IntRange(min=1),
    default=10_000,
    show_default=True,
    help="Most images of a shard.",
)
@click.option(
    "--shard-mb",
    type=click.FloatRange(min=0, min_open=True),
    default=500.0,
    show_default=True,
    help="Most megabytes of images of a shard.",
)
@click.option(
    "--embed-parameters", is_flag=True, help="Write prompt, seed and so on into PNG files, as text."
)
@click.option("--sidecars", is_flag=True, help="Write KEY.json beside each image file.")
@click.option("--license", "license_name", metavar="ID", help="For the card, such as cc-by-4.0.")
@click.option("--title", help="For the card.")
@click.option(
    "--source",
    envvar="KREA_PROMPTS",
    help="What the prompts are of, for the card; without credentials.",
)
@click.option("--fresh", is_flag=True, help="Put images into shards anew, not as the last version.")
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    help="Remove complete versions but the last so many.  [default: keep all]",
)
@click.option(
    "--threads", type=click.IntRange(1, 256), help="[default: one for each core, or 8 for URLs]"
)
@click.option("--json", "as_json", is_flag=True, help="Print figures as JSON on stdout.")
def export_command(
    *,
    storage: str,
    journal_url: str,
    to: str | None,
    form: str,
    everything: bool,
    partitions: Sequence[str],
    where: Sequence[str],
    columns: Sequence[str],
    splits: Sequence[str],
    leaks: bool,
    shard_images: int,
    shard_mb: float,
    embed_parameters: bool,
    sidecars: bool,
    license_name: str | None,
    title: str | None,
    source: str | None,
    fresh: bool,
    keep: int | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Hand the accepted images on as a dataset, each held against its hash on the way.

    Buys nothing, and needs no network where images and target are folders. Splits are drawn from
    the prompts' text: equal prompts are never in two, and none moves as the table grows.
    """
    from krea_dagster.curation.export.export import export  # noqa: PLC0415 - keeps --help quick
    from krea_dagster.curation.export.spec import ExportSpec  # noqa: PLC0415 - as above
    from krea_dagster.engine.storage.storage import Storage  # noqa: PLC0415 - as above

    spec = ExportSpec.parse(
        splits=splits,
        where=where,
        form=form,
        everything=everything,
        partitions=tuple(partitions) or None,
        columns=tuple(columns) or None,
        shard_images=shard_images,
        shard_bytes=max(1, round(shard_mb * 1e6)),
        leaks=leaks,
        embed_parameters=embed_parameters,
        sidecars=sidecars,
        license=license_name,
        title=title,
        source=source,
    )
    root = Storage(storage)
    done = export(
        root,
        spec,
        to or root.locate(f"exports/{form}"),
        fresh=fresh,
        keep=keep,
        threads=threads,
        on_progress=_lines(),
    )
    if not everything:
        _warn_of_verdicts(root, journal_url, done)
    if as_json:
        click.echo(json.dumps(done.figures(), indent=2))
    else:
        _show(done)


def _warn_of_verdicts(root: Storage, journal_url: str, done: Exported) -> None:
    """Say where somebody has refused an image since ``accepted_images`` was made."""
    from krea_dagster.curation.export.target import ExportTarget  # noqa: PLC0415 - keeps --help quick
    from krea_dagster.engine.journal.database import database_in, has_database  # noqa: PLC0415 - as above
    from krea_dagster.engine.journal.verdict_log import FLAG, REJECT, VerdictLog  # noqa: PLC0415 - as above

    if not journal_url and root.folder is None:
        return
    url = journal_url or database_in(root)
    if not has_database(url):
        return
    path, _, version = done.path.rpartition("/")
    images = ExportTarget(path).index(version)["image_sha256"].to_pylist()
    with closing(VerdictLog.open(url)) as verdicts:
        found = verdicts.current(images).values()
    refused = sum(1 for one in found if one.verdict in (REJECT, FLAG))
    if refused:
        click.echo(
            f"{refused} of these images {'was' if refused == 1 else 'were'} rejected or flagged "
            "since accepted_images was made: materialize it, and export again.",
            err=True,
        )


def _lines() -> Callable[[ExportProgress], None]:
    """What says how far it is, every few seconds, on stderr."""
    next_s = time.monotonic() + _LINE_EVERY_S

    def show(progress: ExportProgress) -> None:
        nonlocal next_s
        if time.monotonic() >= next_s:
            next_s = time.monotonic() + _LINE_EVERY_S
            click.echo(f"{progress.images} of {progress.total} images exported", err=True)

    return show


def _show(done: Exported) -> None:
    facts = done.facts
    for name, images in facts.splits.items():
        leaked = facts.leaked.get(name, 0)
        said = f", {leaked} left out that are alike in a later split" if leaked else ""
        click.echo(f"{name:<10} {images} images{said}")
    click.echo(
        f"{'shards':<10} {done.shards}: {done.written} written, {done.linked} unchanged, "
        f"{done.found} there already"
    )
    click.echo(f"{'size':<10} {done.bytes / 1e6:.1f} MB")
    click.echo(f"{'credits':<10} {facts.credits:g} for these images")
    click.echo(f"{'version':<10} {done.path}")
    if len(facts.splits) > 1 and not facts.likeness_known and not done.spec.leaks:
        click.echo(
            "Near-duplicates across splits were not looked for: materialize near_duplicates first.",
            err=True,
        )
