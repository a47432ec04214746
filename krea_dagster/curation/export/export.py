"""Makes an export: choose, plan, write what is missing, read it back, and publish it at once.

Each image is held against the manifest's sha256 on its way. Where one is not what it should be,
the rest is looked at too, so that all are named, and nothing is published. What an interrupted
export has written is read back, and not written again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from krea_dagster import redact
from krea_dagster.curation.export.card import DatasetFacts, facts_of, write_card
from krea_dagster.curation.export.plan import make_plan, shard_layout
from krea_dagster.curation.export.selected_rows import choose
from krea_dagster.curation.export.shards import ExportProgress, PreviousVersion, ShardBuilder
from krea_dagster.curation.export.spec import ExportSpec
from krea_dagster.curation.export.target import ExportTarget
from krea_dagster.curation.export.version_files import finish
from krea_dagster.curation.similarity.near_duplicates import read_near_duplicates
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import StorageError


@dataclass(frozen=True)
class Exported:
    """What was published. ``path`` is the version's folder or URL.

    Shards were ``written`` now, ``found`` from an interrupted export or in this very version, or
    ``linked`` because they have not changed since the version before.
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

    @property
    def shards(self) -> int:
        """All shards."""
        return self.written + self.found + self.linked

    def figures(self) -> dict[str, Any]:
        """The same as figures, for JSON."""
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
            "likeness_known": facts.likeness_known,
            "left_out_by_filter": self.left_by_filter,
            "repeated": self.repeated,
            "shards": self.shards,
            "shards_written": self.written,
            "shards_found": self.found,
            "shards_linked": self.linked,
            "bytes": self.bytes,
            "credits_charged": facts.credits,
            "versions_removed": list(self.removed),
        }


def export(
    storage: Storage,
    spec: ExportSpec,
    to: str,
    *,
    folders: Sequence[str] = (),
    fresh: bool = False,
    keep: int | None = None,
    threads: int | None = None,
    on_progress: Callable[[ExportProgress], object] = lambda _: None,
) -> Exported:
    """Export images of a storage root to a folder or URL, as a new version; see ``target``.

    ``folders`` as for the manifests. ``fresh`` puts images into shards anew, instead of where the
    version before has them. ``keep`` removes complete versions but the last so many; None keeps
    all. Raises ConfigError where nothing can be chosen, ImagesNotAsStored where files are missing
    or changed, and StorageError where the target cannot be written; then nothing was published.
    """
    try:
        return _export(
            storage,
            spec,
            ExportTarget(to),
            folders,
            fresh=fresh,
            keep=keep,
            threads=threads,
            on_progress=on_progress,
        )
    except OSError as error:
        said = redact.text(str(error), to)
        raise StorageError(
            f"the export to {redact.location(to)} failed, and nothing was published: {said}"
        ) from redact.safe_cause(error, to)


def _export(
    storage: Storage,
    spec: ExportSpec,
    target: ExportTarget,
    folders: Sequence[str],
    *,
    fresh: bool,
    keep: int | None,
    threads: int | None,
    on_progress: Callable[[ExportProgress], object],
) -> Exported:
    with choose(storage, spec, folders) as rows:
        latest = None if fresh else target.latest()
        before = target.described(latest) if latest else None
        index = (
            target.index(latest)
            if latest and before and before.get("layout") == shard_layout(spec)
            else None
        )
        known = read_near_duplicates(storage, folders, ["image_sha256", "cluster"])
        plan = make_plan(rows, spec, known, index)
        facts = facts_of(rows, plan, spec)
        card = write_card(facts, spec, plan)
        version = plan.version(card)
        work = ShardBuilder(
            storage,
            target,
            rows,
            spec,
            version,
            PreviousVersion.read(latest, before, target),
            on_progress,
            plan.images,
        )
        done = work.run(plan, threads)
        described = finish(work, plan, done, card, facts)
    target.publish(version)
    how = [one.how for one in done]
    return Exported(
        version=version,
        path=target.locate(version),
        spec=spec,
        facts=facts,
        schema=rows.schema,
        left_by_filter=rows.left.by_filter,
        repeated=rows.left.repeated,
        written=how.count("written"),
        found=how.count("found"),
        linked=how.count("linked"),
        bytes=described["bytes"],
        removed=[] if keep is None else target.prune(keep),
    )
