"""Builds the shards of an export: each is found, linked, or written and verified."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from krea_dagster.curation.export.folder import (
    check_folder,
    images_sha256,
    next_to_endings,
    write_folder,
)
from krea_dagster.curation.export.image_content import (
    BadImage,
    CorruptShard,
    ExportedFile,
    ExportedImage,
    ImagesNotAsStored,
    InOrder,
    ShardContent,
    check_stored,
    read_images,
)
from krea_dagster.curation.export.known_files import IndexedFiles, KnownFiles
from krea_dagster.curation.export.parquet import check_parquet, write_parquet
from krea_dagster.curation.export.plan import ExportPlan, Shard, content_of
from krea_dagster.curation.export.selected_rows import SelectedRows
from krea_dagster.curation.export.spec import ONE_FILE, ExportSpec
from krea_dagster.curation.export.tar import check_tar, write_tar
from krea_dagster.curation.export.target import ExportTarget, crc32_of
from krea_dagster.curation.in_order import in_order
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
    """A verified shard with its image ``files``. ``how`` is ``found``, ``linked`` or ``written``.

    ``crc32`` is of the shard's file, None where it is a folder.
    """

    shard: Shard
    how: str
    bytes: int
    crc32: str | None
    images_sha256: str
    files: Sequence[ExportedFile]


@dataclass(frozen=True)
class PreviousVersion:
    """The previous version: its shards by fingerprint, and its image files."""

    version: str
    shards: Mapping[str, Mapping[str, Any]]
    files: IndexedFiles

    @classmethod
    def of(
        cls, version: str | None, described: Mapping[str, Any] | None, index: pa.Table | None
    ) -> PreviousVersion | None:
        """Return a version that is described so; None where there is no complete one."""
        if version is None or described is None:
            return None
        shards = {one["fingerprint"]: one for one in described["shards"]}
        return cls(version, shards, IndexedFiles(index))


@dataclass
class ShardBuilder:
    """Builds the shards of one version."""

    storage: Storage
    target: ExportTarget
    rows: SelectedRows
    spec: ExportSpec
    version: str
    previous: PreviousVersion | None
    known: KnownFiles
    on_progress: Callable[[ExportProgress], object]
    bad: list[BadImage] = field(default_factory=list)

    def run(self, plan: ExportPlan, threads: int | None) -> list[FinishedShard]:
        """Build all shards; return them in the plan's order. Raises ImagesNotAsStored."""
        local = self.storage.folder is not None and self.target.is_folder
        workers = threads or ((os.cpu_count() or 1) if local else _REMOTE_THREADS)
        ready = 0
        with (
            ThreadPoolExecutor(workers, "krea-export") as pool,
            ThreadPoolExecutor(workers, "krea-export-images") as editors,
        ):
            images = self._in_order(editors, 2 * workers // (len(plan.shards) or 1) + 2)
            futures = [pool.submit(self.build, shard, images) for shard in plan.shards]
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

    def _in_order(self, editors: Executor, ahead: int) -> InOrder:
        """Return how the images of a shard are read: a few ahead, where that takes long."""
        if not self.rows.edits.is_slow:
            return map
        return lambda function, items: in_order(editors, function, items, ahead)

    def build(self, shard: Shard, images: InOrder) -> FinishedShard | None:
        """Build one shard; None where images are bad, which are added to ``bad``."""
        content = content_of(self.rows, shard)
        if self.bad:  # nothing will be published: the other images are only checked
            check_stored(content, self.storage, self.bad.append)
            return None
        found = self._found(shard, content) or self._linked(shard, content)
        if found is not None:
            return found
        done = self._written(shard, content, images)
        if done is not None and content.edits.changes_files:
            self.known.note(shard, done.files)
        return done

    def _stored(self, shard: Shard, content: ShardContent) -> Sequence[ExportedFile] | None:
        """Return the files as they are stored; None if the export changes them."""
        if content.edits.changes_files:
            return None
        sizes = self.rows.sizes[shard.rows].tolist()
        items = zip(content.items, sizes, strict=True)
        return [ExportedFile(item.sha256, size) for item, size in items]

    def _found(self, shard: Shard, content: ShardContent) -> FinishedShard | None:
        files = self._stored(shard, content) or self.known.of(shard, content.keys)
        if files is None:
            return None
        name = f"{self.version}/{shard.name}"
        try:
            if self.spec.form not in ONE_FILE:
                check_folder(self.target, name, content, files, self.spec)
                return self._done(shard, content, "found", files)
            if self.target.storage.size_bytes(name) is None:
                return None
            return self._checked(shard, content, files, name)
        except CorruptShard:
            return None

    def _checked(
        self, shard: Shard, content: ShardContent, files: Sequence[ExportedFile], name: str
    ) -> FinishedShard:
        folder = self.target.storage.folder
        if folder is not None:
            return self._verified(shard, content, "found", files, folder / name)
        with self.target.storage.scratch() as copy:
            self.target.fetch(name, copy)
            return self._verified(shard, content, "found", files, copy)

    def _linked(self, shard: Shard, content: ShardContent) -> FinishedShard | None:
        """Link a shard of the previous version, where it is unchanged."""
        previous = self.previous
        known = None if previous is None else previous.shards.get(shard.fingerprint)
        if previous is None or known is None or previous.version == self.version:
            return None
        files = self._stored(shard, content) or previous.files.of(content.keys)
        if files is None:
            return None
        old, new = f"{previous.version}/{known['name']}", f"{self.version}/{shard.name}"
        if self.spec.form not in ONE_FILE:
            try:
                check_folder(self.target, old, content, files, self.spec)
            except CorruptShard:
                return None
            for item in content.items:
                self.target.link(f"{old}/{item.file}", f"{new}/{item.file}")
                for ending in next_to_endings(self.spec):
                    name = f"{item.key}.{ending}"
                    self.target.link(f"{old}/{name}", f"{new}/{name}")
            return self._done(shard, content, "linked", files)
        if self.target.storage.size_bytes(old) != known["bytes"]:
            return None
        # An object store has its own checksums, and verifying would download everything.
        if self.target.is_folder and self.target.crc32(old) != known["crc32"]:
            return None
        self.target.link(old, new)
        return FinishedShard(
            shard, "linked", known["bytes"], known["crc32"], images_sha256(content, files), files
        )

    def _written(
        self, shard: Shard, content: ShardContent, in_order: InOrder
    ) -> FinishedShard | None:
        bad_before, files = len(self.bad), list[ExportedFile]()
        images = _noted(read_images(content, self.storage, self.bad.append, in_order), files)
        name = f"{self.version}/{shard.name}"
        if self.spec.form not in ONE_FILE:
            write_folder(self.target, name, content, images, self.spec)
            if len(self.bad) > bad_before:
                return None
            check_folder(self.target, name, content, files, self.spec)
            return self._done(shard, content, "written", files)
        with self.target.storage.scratch() as path:
            _WRITE[self.spec.form](path, content, images)
            if len(self.bad) > bad_before:
                return None
            done = self._verified(shard, content, "written", files, path)
            self.target.send(path, name)
        return done

    def _verified(
        self,
        shard: Shard,
        content: ShardContent,
        how: str,
        files: Sequence[ExportedFile],
        path: Path,
    ) -> FinishedShard:
        """Verify a shard's file. Raises CorruptShard."""
        _CHECK[self.spec.form](path, content, files)
        with path.open("rb") as file:
            crc32 = crc32_of(file)
        images = images_sha256(content, files)
        return FinishedShard(shard, how, path.stat().st_size, crc32, images, files)

    def _done(
        self, shard: Shard, content: ShardContent, how: str, files: Sequence[ExportedFile]
    ) -> FinishedShard:
        size = sum(file.bytes for file in files)
        return FinishedShard(shard, how, size, None, images_sha256(content, files), files)


def _noted(images: Iterable[ExportedImage], files: list[ExportedFile]) -> Iterator[ExportedImage]:
    """Yield the images, and add what is known of their files to ``files``."""
    for image in images:
        files.append(image.file)
        yield image
