"""Exports images as a dataset: select, plan, write the missing shards, verify, and publish.

Each image is compared with the manifest's sha256. If one differs, the remaining ones are checked
too, so that the error names all, and nothing is published. Shards of an interrupted export are
verified and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster import redact
from krea_dagster.curation.export.card import write_card
from krea_dagster.curation.export.dataset_facts import DatasetFacts, facts_of
from krea_dagster.curation.export.hub import Pushed
from krea_dagster.curation.export.known_files import KnownFiles
from krea_dagster.curation.export.plan import make_plan, shard_layout
from krea_dagster.curation.export.selected_rows import (
    SelectedRows,
    left_out_partitions,
    select_rows,
)
from krea_dagster.curation.export.shards import ExportProgress, PreviousVersion, ShardBuilder
from krea_dagster.curation.export.spec import ExportSpec
from krea_dagster.curation.export.target import ExportTarget
from krea_dagster.curation.export.version_files import write_version_files
from krea_dagster.curation.similarity.near_duplicates import read_near_duplicates
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError, StorageError


@dataclass(frozen=True)
class Exported:
    """A published version. ``path`` is its folder or URL.

    Shards were ``written`` now, ``found`` from an interrupted export or in this very version, or
    ``linked`` from the previous version because they are unchanged.
    """

    version: str
    path: str
    spec: ExportSpec
    facts: DatasetFacts
    schema: pa.Schema
    left_by_filter: int
    repeated: int
    written: int
    found: int
    linked: int
    bytes: int
    removed: Sequence[str] = ()
    pushed: Pushed | None = None

    @property
    def shards(self) -> int:
        """Return the number of shards."""
        return self.written + self.found + self.linked

    def summary(self) -> dict[str, Any]:
        """Return the summary as JSON."""
        facts = self.facts
        return {
            "version": self.version,
            "path": self.path,
            "form": self.spec.form,
            "images": facts.images,
            "prompts": facts.prompts,
            "splits": {
                name: {"images": count, "left_out_as_alike": facts.leaked.get(name, 0)}
                for name, count in facts.splits.items()
            },
            "partitions_left_out": list(facts.left_out),
            "never_judged": facts.never_judged,
            "likeness_known": facts.near_duplicates_known,
            "left_out_by_filter": self.left_by_filter,
            "repeated": self.repeated,
            "shards": self.shards,
            "shards_written": self.written,
            "shards_found": self.found,
            "shards_linked": self.linked,
            "bytes": self.bytes,
            "credits_charged": facts.credits,
            "versions_removed": list(self.removed),
            "pushed": self.pushed and asdict(self.pushed),
        }


def export(
    storage: Storage,
    spec: ExportSpec,
    to: str,
    *,
    folders: Sequence[str] = (),
    origin: str = "",
    refused: Collection[str] = (),
    earlier: pa.Table | None = None,
    verdicts: pa.Table | None = None,
    fresh: bool = False,
    keep: int | None = None,
    threads: int | None = None,
    on_progress: Callable[[ExportProgress], object] = lambda _: None,
) -> Exported:
    """Export images of a storage root to a folder or URL, as a new version (see ``target``).

    ``folders`` as for the manifests. ``origin`` is where the images come from, for the card: a
    host, or "an emulator". None of the images may be among ``refused``, by sha256. ``earlier``
    images are exported too. ``verdicts`` are exported as columns. ``fresh`` distributes the images
    to shards again, instead of keeping them where the previous version has them. ``keep`` is the
    number of complete versions to keep, None for all.

    Raises ConfigError where no image is selected, or one was refused, ImagesNotAsStored where files
    are missing or changed, and StorageError where the target cannot be written; then nothing was
    published.
    """
    selected = select_rows(
        storage, spec, folders, origin=origin, earlier=earlier, verdicts=verdicts
    )
    with _storage_errors(to), selected as rows:
        target = ExportTarget(to, storage.options_for(to))
        latest = None if fresh else target.latest()
        previous = target.described(latest) if latest else None
        index = target.index(latest) if latest and previous else None
        same_layout = previous is not None and previous.get("layout") == shard_layout(spec)
        similar = read_near_duplicates(storage, folders, ["image_sha256", "cluster"])
        _check_verdicts(rows, refused)
        plan = make_plan(rows, spec, similar, index if same_layout else None)
        left_out = left_out_partitions(storage, spec, folders)
        facts = facts_of(rows, plan, spec, origin, left_out)
        version = plan.version(write_card(facts, spec, plan, version=""))
        card = write_card(facts, spec, plan, version=version)
        builder = ShardBuilder(
            storage,
            target,
            rows,
            spec,
            version,
            PreviousVersion.of(latest, previous, index),
            KnownFiles(target, version),
            on_progress,
        )
        shards = builder.run(plan, threads)
        described = write_version_files(builder, plan, shards, card, facts)
        target.publish(version)
        how = [one.how for one in shards]
        return Exported(
            version=version,
            path=target.locate(version),
            spec=spec,
            facts=facts,
            schema=rows.schema,
            left_by_filter=rows.left_by_filter,
            repeated=rows.repeated,
            written=how.count("written"),
            found=how.count("found"),
            linked=how.count("linked"),
            bytes=described["bytes"],
            removed=[] if keep is None else target.prune(keep),
        )


def _check_verdicts(rows: SelectedRows, refused: Collection[str]) -> None:
    """Raise ConfigError if an image was rejected or flagged since it was accepted."""
    if not refused:
        return
    images = rows.column("image_sha256")
    places = pc.is_in(images, value_set=pa.array(sorted(refused), images.type))
    late = rows.column("prompt_id").filter(places).to_pylist()
    if late:
        named = ", ".join(map(str, late[:5])) + (" …" if len(late) > 5 else "")
        raise ConfigError(
            f"{len(late)} of these images were rejected or flagged since they were accepted: "
            f"{named}. Nothing was published. Bring the accepted images up to date "
            "(`krea-dagster curate`, or materialize accepted_images in Dagster), and export again."
        )


@contextmanager
def _storage_errors(to: str) -> Iterator[None]:
    """Raise an OSError as StorageError, without the credentials of the target."""
    try:
        yield
    except OSError as error:
        message = redact.text(str(error), to)
        raise StorageError(
            f"the export to {redact.location(to)} failed, and nothing was published: {message}"
        ) from redact.safe_cause(error, to)
