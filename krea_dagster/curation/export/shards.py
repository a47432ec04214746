"""Builds the shards of an export: each is found, linked, or written and verified."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from krea_dagster.curation.export.folder import (
    check_folder,
    images_sha256,
    next_to_endings,
    write_folder,
)
from krea_dagster.curation.export.image_content import (
    BadImage,
    CorruptShard,
    ImagesNotAsStored,
    ShardContent,
    read_images,
)
from krea_dagster.curation.export.parquet import check_parquet, write_parquet
from krea_dagster.curation.export.plan import ExportPlan, Shard, content_of
from krea_dagster.curation.export.selected_rows import SelectedRows
from krea_dagster.curation.export.spec import ONE_FILE, ExportSpec
from krea_dagster.curation.export.tar import check_tar, write_tar
from krea_dagster.curation.export.target import ExportTarget, crc32_of
from krea_dagster.engine.storage.storage import Storage

_WRITE: Final = {"webdataset": write_tar, "parquet": write_parquet}
_CHECK: Final = {"webdataset": check_tar, "parquet": check_parquet}

#: Threads where images or target are behind a URL: they mostly wait.
_REMOTE_THREADS: Final = 8


@dataclass(frozen=True)
class ExportProgress:
    """The images in verified shards, of all images."""

    images: int
    total: int


@dataclass(frozen=True)
class FinishedShard:
    """A verified shard. ``how`` is ``found``, ``linked`` or ``written``; ``shas`` are its images'.

    ``crc32`` is of the shard's file, None where it is a folder.
    """

    shard: Shard
    how: str
    bytes: int
    crc32: str | None
    images_sha256: str
    shas: Sequence[str]


@dataclass(frozen=True)
class PreviousVersion:
    """The previous version: its shards by fingerprint, and the hashes of its images by key."""

    version: str
    shards: Mapping[str, Mapping[str, Any]]
    exported: Mapping[str, str]

    @classmethod
    def read(
        cls, version: str | None, described: Mapping[str, Any] | None, target: ExportTarget
    ) -> PreviousVersion | None:
        """Read a version; None where there is no complete one."""
        if version is None or described is None:
            return None
        # Hashes differ from the manifest's only where parameters are embedded.
        exported: dict[str, str] = {}
        if described.get("embed_parameters"):
            index = target.index(version)
            exported = dict(
                zip(index["key"].to_pylist(), index["exported_sha256"].to_pylist(), strict=True)
            )
        return cls(version, {one["fingerprint"]: one for one in described["shards"]}, exported)


@dataclass
class ShardBuilder:
    """Builds the shards of one version."""

    storage: Storage
    target: ExportTarget
    rows: SelectedRows
    spec: ExportSpec
    version: str
    previous: PreviousVersion | None
    on_progress: Callable[[ExportProgress], object]
    bad: list[BadImage] = field(default_factory=list)

    def run(self, plan: ExportPlan, threads: int | None) -> list[FinishedShard]:
        """Build all shards; return them in the plan's order. Raises ImagesNotAsStored."""
        local = self.storage.folder is not None and self.target.is_folder
        workers = threads or ((os.cpu_count() or 1) if local else _REMOTE_THREADS)
        ready = 0
        with ThreadPoolExecutor(workers, "krea-export") as pool:
            futures = [pool.submit(self.build, shard) for shard in plan.shards]
            try:
                for future in as_completed(futures):
                    if (done := future.result()) is not None:
                        ready += len(done.shard.rows)
                    self.on_progress(ExportProgress(ready, plan.images))
            except BaseException:
                for future in futures:
                    future.cancel()
                raise
        if self.bad:
            order = sorted(self.bad, key=lambda one: (one.prompt_id, one.sample))
            raise ImagesNotAsStored(order)
        return [done for future in futures if (done := future.result()) is not None]

    def build(self, shard: Shard) -> FinishedShard | None:
        """Build one shard; None where images are bad, which are added to ``bad``."""
        content = content_of(self.rows, self.spec, shard)
        if self.bad:  # nothing will be published: the other images are only checked
            for _ in read_images(content, self.storage, self.bad.append):
                pass
            return None
        found = self._found(shard, content) or self._linked(shard, content)
        return found or self._written(shard, content)

    def _found(self, shard: Shard, content: ShardContent) -> FinishedShard | None:
        name = f"{self.version}/{shard.name}"
        try:
            if self.spec.form not in ONE_FILE:
                shas = check_folder(self.target, name, content, self.spec)
                return self._done(shard, content, "found", shas)
            if self.target.storage.size_bytes(name) is None:
                return None
            return self._checked(shard, content, name)
        except CorruptShard:
            return None

    def _checked(self, shard: Shard, content: ShardContent, name: str) -> FinishedShard:
        folder = self.target.storage.folder
        if folder is not None:
            return self._verified(shard, content, "found", folder / name)
        with self.target.storage.scratch() as copy:
            self.target.fetch(name, copy)
            return self._verified(shard, content, "found", copy)

    def _linked(self, shard: Shard, content: ShardContent) -> FinishedShard | None:
        """Link a shard of the previous version, where it is unchanged."""
        previous = self.previous
        known = None if previous is None else previous.shards.get(shard.fingerprint)
        if previous is None or known is None or previous.version == self.version:
            return None
        old, new = f"{previous.version}/{known['name']}", f"{self.version}/{shard.name}"
        shas = [item.sha256 for item in content.items]
        if self.spec.embed_parameters:
            if not previous.exported.keys() >= set(content.keys):
                return None
            shas = [previous.exported[key] for key in content.keys]
        if self.spec.form not in ONE_FILE:
            try:
                check_folder(self.target, old, content, self.spec)
            except CorruptShard:
                return None
            for item in content.items:
                self.target.link(f"{old}/{item.file}", f"{new}/{item.file}")
                for ending in next_to_endings(self.spec):
                    name = f"{item.key}.{ending}"
                    self.target.link(f"{old}/{name}", f"{new}/{name}")
            return self._done(shard, content, "linked", shas)
        if self.target.storage.size_bytes(old) != known["bytes"]:
            return None
        # An object store has its own checksums, and verifying would download everything.
        if self.target.is_folder and self.target.crc32(old) != known["crc32"]:
            return None
        self.target.link(old, new)
        return FinishedShard(
            shard, "linked", known["bytes"], known["crc32"], images_sha256(content, shas), shas
        )

    def _written(self, shard: Shard, content: ShardContent) -> FinishedShard | None:
        bad_before = len(self.bad)
        images = read_images(content, self.storage, self.bad.append)
        name = f"{self.version}/{shard.name}"
        if self.spec.form not in ONE_FILE:
            write_folder(self.target, name, content, images, self.spec)
            if len(self.bad) > bad_before:
                return None
            shas = check_folder(self.target, name, content, self.spec)
            return self._done(shard, content, "written", shas)
        with self.target.storage.scratch() as path:
            _WRITE[self.spec.form](path, content, images)
            if len(self.bad) > bad_before:
                return None
            done = self._verified(shard, content, "written", path)
            self.target.send(path, name)
        return done

    def _verified(self, shard: Shard, content: ShardContent, how: str, path: Path) -> FinishedShard:
        """Verify a shard's file. Raises CorruptShard."""
        shas = _CHECK[self.spec.form](path, content)
        with path.open("rb") as file:
            crc32 = crc32_of(file)
        images = images_sha256(content, shas)
        return FinishedShard(shard, how, path.stat().st_size, crc32, images, shas)

    def _done(
        self, shard: Shard, content: ShardContent, how: str, shas: Sequence[str]
    ) -> FinishedShard:
        size = int(self.rows.sizes[shard.rows].sum())
        return FinishedShard(shard, how, size, None, images_sha256(content, shas), shas)
