"""The command ``krea-dagster export``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
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
from krea_dagster.cli.terminal import LINE_EVERY_S

if TYPE_CHECKING:
    from krea_dagster.curation.export.export import Exported
    from krea_dagster.curation.export.shards import ExportProgress


_EPILOG: Final = """
An export is a new version: a folder below --to that never changes. LATEST (and the link latest)
names the current one, and is written last. Shards that have not changed since the previous version
are linked, and shards of an interrupted export are not written again.

\b
  datasets:    load_dataset("TO/latest")
  webdataset:  WebDataset("TO/latest/data/train-{00000..00012}.tar")

\b
Exit codes: 0 published, 1 images are missing or changed and nothing was
published, 2 invalid usage or nothing to export.
"""


@click.command("export", epilog=_EPILOG)
@project_options
@click.option(
    "--to",
    metavar="FOLDER|URL",
    help="The target of the versions.  [default: exports/FORMAT in the storage root]",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["parquet", "imagefolder", "webdataset", "jsonl", "csv"]),
    default="parquet",
    show_default=True,
    help=(
        "parquet (images inside) and imagefolder are for the library datasets, webdataset is tar "
        "shards, jsonl and csv are image files with a table."
    ),
)
@click.option(
    "--all", "everything", is_flag=True, help="Export all stored images, not only accepted ones."
)
@click.option("--kept", is_flag=True, help="Export only images that a person has kept.")
@earlier_option
@partition_option
@where_option
@click.option(
    "--ids",
    "ids_file",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Export only the rows with these prompt_ids, one per line.",
)
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="NAME[=NEW]",
    help=(
        "Export this column, as NEW if given (prompt=text); repeatable. Measures are columns.  "
        "[default: all but those of this storage root]"
    ),
)
@click.option(
    "--verdicts",
    is_flag=True,
    help="Export the verdicts as columns: with reason, tags, note, reviewer and time.",
)
@click.option(
    "--split",
    "splits",
    multiple=True,
    metavar="NAME=SHARE",
    help="A split and its share of the prompts, such as train=0.9; they must sum to 1.  [train=1]",
)
@click.option(
    "--leaks",
    is_flag=True,
    help="Keep similar images in several splits; otherwise only the last split has them.",
)
@click.option(
    "--shard-images",
    type=click.IntRange(min=1),
    default=10_000,
    show_default=True,
    help="Maximum images per shard.",
)
@click.option(
    "--shard-mb",
    type=click.FloatRange(min=0, min_open=True),
    default=500.0,
    show_default=True,
    help="Maximum megabytes of images per shard.",
)
@click.option(
    "--image-format",
    type=click.Choice(["png", "jpeg", "webp"]),
    help="Convert the images.  [default: as they are]",
)
@click.option(
    "--quality",
    type=click.IntRange(1, 100),
    help="Quality of JPEG and WebP files that are encoded.  [default: 95]",
)
@click.option(
    "--longest-side",
    type=click.IntRange(min=1),
    metavar="PIXELS",
    help="Make larger images smaller.  [default: as they are]",
)
@click.option(
    "--mark/--no-mark",
    default=True,
    show_default=True,
    help="Mark PNG, JPEG and WebP files as generated, in their metadata (IPTC).",
)
@click.option(
    "--certificate",
    envvar="KREA_C2PA_CERTIFICATE",
    metavar="FILE",
    help=(
        "Sign the files with content credentials (C2PA): the certificate, and those it was issued "
        "under, as PEM. Needs the extra c2pa.  [$KREA_C2PA_CERTIFICATE]"
    ),
)
@click.option(
    "--private-key",
    envvar="KREA_C2PA_PRIVATE_KEY",
    metavar="FILE",
    help="The certificate's key as PEM.  [$KREA_C2PA_PRIVATE_KEY]",
)
@click.option(
    "--embed-parameters",
    is_flag=True,
    help="Write prompt, seed and other parameters into PNG files.",
)
@click.option("--sidecars", is_flag=True, help="Write KEY.json next to each image file.")
@click.option(
    "--captions", is_flag=True, help="Write KEY.txt, with the prompt, next to each image file."
)
@click.option(
    "--push",
    metavar="OWNER/NAME",
    help=(
        "Push the version to this dataset repository of the Hugging Face Hub, with the token in "
        "HF_TOKEN. Needs the extra hub."
    ),
)
@click.option("--public", is_flag=True, help="Create that repository as a public one.")
@click.option(
    "--license", "license_name", metavar="ID", help="Licence for the card, such as cc-by-4.0."
)
@click.option("--title", help="Title for the card.")
@click.option(
    "--source",
    help="Origin of the prompts for the card, without credentials.  [default: KREA_PROMPTS]",
)
@click.option("--fresh", is_flag=True, help="Distribute images to shards again.")
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    help="Number of complete versions to keep.  [default: all]",
)
@click.option(
    "--threads", type=click.IntRange(1, 256), help="[default: one per core, or 8 for URLs]"
)
@json_option
def export_command(
    *,
    to: str | None,
    form: str,
    everything: bool,
    partitions: Sequence[str],
    where: Sequence[str],
    columns: Sequence[str],
    verdicts: bool,
    splits: Sequence[str],
    leaks: bool,
    shard_images: int,
    shard_mb: float,
    image_format: str | None,
    quality: int | None,
    longest_side: int | None,
    mark: bool,
    certificate: str | None,
    private_key: str | None,
    embed_parameters: bool,
    sidecars: bool,
    captions: bool,
    kept: bool,
    earlier: bool,
    ids_file: str | None,
    push: str | None,
    public: bool,
    license_name: str | None,
    title: str | None,
    source: str | None,
    fresh: bool,
    keep: int | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Export the accepted images as a dataset, and verify each against its hash.

    This buys nothing, and needs no network where images and target are folders. Splits depend on
    the prompts' text: equal prompts are never in two splits, and none moves as the table grows.
    """
    from krea_dagster.curation.export.spec import ExportSpec

    krea = open_krea()
    spec = ExportSpec.parse(
        splits=splits,
        where=where,
        form=form,
        everything=everything,
        partitions=tuple(partitions) or None,
        columns=columns,
        verdicts=verdicts,
        kept=kept,
        earlier=earlier,
        prompt_ids=None if ids_file is None else _prompt_ids(ids_file),
        captions=captions,
        shard_images=shard_images,
        shard_bytes=max(1, round(shard_mb * 1e6)),
        leaks=leaks,
        image_format=image_format,
        quality=quality,
        longest_side=longest_side,
        mark=mark,
        certificate=certificate,
        private_key=private_key,
        embed_parameters=embed_parameters,
        sidecars=sidecars,
        push=push,
        public=public,
        license=license_name,
        title=title,
        source=source or os.environ.get("KREA_PROMPTS"),
    )
    done = krea.export(
        spec, to, fresh=fresh, keep=keep, threads=threads, on_progress=_progress_lines()
    )
    if as_json:
        click.echo(json.dumps(done.summary(), indent=2))
    else:
        _print_summary(done)


def _prompt_ids(file: str) -> frozenset[str]:
    lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    return frozenset(line.strip() for line in lines if line.strip())


def _progress_lines() -> Callable[[ExportProgress], None]:
    """Return a callback that prints the progress to stderr every few seconds."""
    next_s = time.monotonic() + LINE_EVERY_S

    def show(progress: ExportProgress) -> None:
        nonlocal next_s
        if time.monotonic() >= next_s:
            next_s = time.monotonic() + LINE_EVERY_S
            click.echo(f"{progress.images} of {progress.total} images exported", err=True)

    return show


def _print_summary(done: Exported) -> None:
    facts = done.facts
    for name, images in facts.splits.items():
        leaked = facts.leaked.get(name, 0)
        note = f", {leaked} left out that are similar to a later split's" if leaked else ""
        click.echo(f"{name:<10} {images} images{note}")
    click.echo(
        f"{'shards':<10} {done.shards}: {done.written} written, {done.linked} unchanged, "
        f"{done.found} there already"
    )
    click.echo(f"{'size':<10} {done.bytes / 1e6:.1f} MB")
    click.echo(f"{'credits':<10} {facts.credits:g} for these images")
    click.echo(f"{'version':<10} {done.path}")
    if done.pushed is not None:
        what = "pushed" if done.pushed.is_new else "nothing new"
        click.echo(f"{'hub':<10} {done.pushed.url}: {what}, commit {done.pushed.commit[:12]}")
    if facts.left_out:
        named = ", ".join(facts.left_out[:5]) + (" …" if len(facts.left_out) > 5 else "")
        click.echo(
            f"{len(facts.left_out)} partitions have no accepted images yet, and are not in it: "
            f"{named}. krea-dagster curate makes them.",
            err=True,
        )
    if facts.never_judged:
        click.echo(
            f"{facts.never_judged} of {facts.images} images were never judged. --kept exports only "
            "those that a person kept.",
            err=True,
        )
    if len(facts.splits) > 1 and not facts.near_duplicates_known and not done.spec.leaks:
        click.echo(
            "Near-duplicates across splits are unknown: materialize near_duplicates first.",
            err=True,
        )
