"""Removes the files of images that nothing needs: rejected, replaced, or of rows that are gone.

What is not certain is kept: the reasons are counted. The order is such that a process may be killed
at any time: the journal knows of a removal before the manifests do, and they before the file goes.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.application.backend import Backend
from krea_dagster.arrow import as_array
from krea_dagster.digests import Digests, DigestSet, digests_from_hex, hex_from_digests
from krea_dagster.engine.journal.bulk_reads import files_in_root
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.storage.storage import STORE_THREADS, Storage
from krea_dagster.engine.verdict import KEEP, REJECT
from krea_dagster.errors import ConfigError
from krea_dagster.manifest import (
    SUCCESSOR,
    accepted_requests,
    earlier_images,
    earlier_rows,
    present_rows,
    rows_with_requests,
    without_files,
)
from krea_dagster.prompts import PromptTable

REJECTED: Final = "rejected"
REPLACED: Final = "replaced"
UNLISTED: Final = "unlisted"

#: Why a file is kept, of an image that is asked for.
_ACCEPTED: Final = "accepted: `krea-dagster curate` brings the accepted images up to date"
_KEPT: Final = "a person kept it"
_REQUESTED: Final = "the prompt table requests it again: materialize first"
_NO_SUCCESSOR: Final = "its successor is not stored, or was rejected"
_OF_OTHERS: Final = "of another prompt table: name it with --prompts"
_NOT_CERTAIN: Final = "no manifest was written without it yet: materialize first"
_HELD: Final = "a run holds it, or another storage root has it too"

#: The columns that say which images they are.
COLUMNS: Final = (
    "request_key", "prompt_id", "sample", "prompt", "size", "quality", "seed", "attempt",
    "stored_at", "credits_charged", "image_path", "image_bytes", SUCCESSOR,
)  # fmt: skip


@dataclass(frozen=True)
class PrunedImages:
    """The images whose files were removed, or would be.

    Attributes:
        images: One row for each: why (``rejected``, ``replaced`` or ``unlisted``), what was
            requested, when and for how much it was bought, its path and size, and the request_key
            of its successor.
        left: How many were left alone, by reason.
        finished: How many files of an interrupted call were removed as well.
        files_before: The files in images/ before, and ``bytes_before`` their size.
        files_after: The files in images/ after, and ``bytes_after`` their size.
        dry_run: Whether nothing was removed; the sizes after are those that it would leave.
    """

    images: pa.Table
    left: Mapping[str, int]
    finished: int
    files_before: int
    bytes_before: int
    files_after: int
    bytes_after: int
    dry_run: bool

    @property
    def counts(self) -> Mapping[str, int]:
        """Number of images by why."""
        return Counter(self.images["why"].to_pylist())


def prune_images(
    backend: Backend, wanted: Collection[str], *, table: PromptTable | None, dry_run: bool
) -> PrunedImages:
    """Remove the files of the ``wanted`` kinds of images; see ``Krea.prune``."""
    storage = backend.open_storage()
    if not wanted:
        raise ConfigError("choose which images to prune: rejected, replaced or unlisted ones")
    if not backend.has_journal():
        raise ConfigError(f"{storage.shown('')} has no journal yet: there is nothing to prune")
    backend.check_root()
    with backend.open_journal() as journal:
        chosen = _RootImages.read(backend, storage, journal, table).choose(storage, wanted)
        before = dict(_sizes(storage))
        root_id = journal.roots.id_of(storage)
        finished = [name for name in journal.pruned.of_root(root_id).values() if name in before]
        names = [storage.name_of(path) for path in chosen.images["image_path"].to_pylist()]
        if dry_run:
            gone: set[str] = {*names, *finished}
            images, kept = chosen.images, {n: size for n, size in before.items() if n not in gone}
        else:
            _enter(journal, chosen.images, root_id)
            pruned = journal.pruned.of_root(root_id)
            without_files(storage, pa.array(pruned, pa.string()))
            _remove(storage, [name for name in pruned.values() if name in before])
            entered = pc.is_in(
                chosen.images["request_key"], value_set=pa.array(pruned, pa.string())
            )
            images, kept = chosen.images.filter(entered), dict(_sizes(storage))
            chosen.left[_HELD] += chosen.images.num_rows - images.num_rows
    return PrunedImages(
        images=images,
        left={why: count for why, count in chosen.left.items() if count},
        finished=len(finished),
        files_before=len(before),
        bytes_before=sum(before.values()),
        files_after=len(kept),
        bytes_after=sum(kept.values()),
        dry_run=dry_run,
    )


def pruned_rows(backend: Backend, digests: Digests) -> int:
    """Return how many of these requests, given as bytes, have an image whose file was pruned.

    Those that were rejected do not count: they were not wanted before. Raises JournalError.
    """
    if not backend.has_journal():
        return 0
    with backend.open_journal() as journal:
        keys = journal.pruned.keys(without=REJECTED)
    return int(DigestSet(digests_from_hex(keys)).contains(digests).sum()) if len(keys) else 0


def pruned_note(rows: int) -> str:
    """Return what a person may do about rows whose image was pruned."""
    return (
        f"{rows:,} rows have an image whose file was pruned; it is neither fetched nor bought "
        "again. `krea-dagster materialize --again pruned` buys another image of these rows"
    )


def take_back(journal: Journal, storage: Storage) -> int:
    """Count pruned files that are there again as stored; return how many. Raises JournalError."""
    root_id = journal.roots.id_of(storage)
    pruned = journal.pruned.of_root(root_id)
    sizes = storage.sizes_bytes(list(pruned.values()))
    there = [key for key, size in zip(pruned, sizes, strict=True) if size is not None]
    journal.pruned.take_back(there, root_id)
    return len(there)


@dataclass(frozen=True)
class _Chosen:
    """The images whose files may go, and how many of the others are kept for which reason."""

    images: pa.Table
    left: Counter[str]


@dataclass(frozen=True)
class _RootImages:
    """The stored images of a root, and what is known of each."""

    files: pa.Table
    earlier: pa.Table
    verdicts: Mapping[str, str]
    accepted: pa.Array
    #: Requests that left a manifest, or whose row has a later attempt.
    left: pa.Array
    #: What the prompt table requests now; None if there is none to read.
    requested: pa.Array | None
    #: The ids of that table, and of those whose images only ``left`` tells to be gone.
    own_table: frozenset[str]
    others: frozenset[str]

    @classmethod
    def read(
        cls, backend: Backend, storage: Storage, journal: Journal, table: PromptTable | None
    ) -> _RootImages:
        requested, own = None, frozenset[str]()
        if table is not None:
            with backend.plan(table) as plan:
                requested = hex_from_digests(plan.all_digests)
            own = frozenset({backend.table_id(journal, table)} - {""})
        kept = earlier_rows(storage, ["request_key"])
        _, attempts = present_rows(storage)
        rows = [one["request_key"] for one in ([] if kept is None else [kept]) + attempts]
        return cls(
            files=files_in_root(journal, journal.roots.id_of(storage)),
            earlier=earlier_images(storage, journal),
            verdicts={sha: one.verdict for sha, one in journal.verdicts.current().items()},
            accepted=accepted_requests(storage),
            left=as_array(pa.chunked_array([c for one in rows for c in one.chunks], pa.string())),
            requested=requested,
            own_table=own,
            # Images from before the journal had tables have an empty id.
            others=journal.tables.generated() | {""},
        )

    def choose(self, storage: Storage, wanted: Collection[str]) -> _Chosen:
        """Return the images of these kinds that nothing needs."""
        keys = as_array(self.files["request_key"])
        successors = self._successors(keys)
        kinds = self._kinds(keys, successors)
        why_not = self._why_not(keys, kinds, successors)
        asked = pc.is_in(kinds, value_set=pa.array(sorted(wanted), pa.string()))
        left = Counter(why_not.filter(asked).drop_null().to_pylist())
        chosen = pc.and_(asked, pc.is_null(why_not))
        keys, kinds = keys.filter(chosen), kinds.filter(chosen)
        images = pa.concat_tables(
            [
                self.earlier.filter(pc.is_in(self.earlier["request_key"], value_set=keys)),
                *rows_with_requests(storage, keys),
            ],
            promote_options="permissive",
        )
        images = images.select(COLUMNS).take(pc.index_in(keys, as_array(images["request_key"])))
        return _Chosen(images.add_column(0, "why", kinds), left)

    def _with_verdict(self, verdict: str) -> pa.Array:
        shas = [sha for sha, given in self.verdicts.items() if given == verdict]
        return pc.is_in(as_array(self.files["image_sha256"]), value_set=pa.array(shas, pa.string()))

    def _successors(self, keys: pa.Array) -> pa.Array:
        places = pc.index_in(keys, value_set=as_array(self.earlier["request_key"]))
        return as_array(self.earlier[SUCCESSOR]).take(places)

    def _kinds(self, keys: pa.Array, successors: pa.Array) -> pa.Array:
        earlier = pc.is_in(keys, value_set=as_array(self.earlier["request_key"]))
        kinds = pc.if_else(pc.is_valid(successors), REPLACED, UNLISTED)
        kinds = pc.if_else(earlier, kinds, pa.scalar(None, pa.string()))
        return pc.if_else(self._with_verdict(REJECT), REJECTED, kinds)

    def _why_not(self, keys: pa.Array, kinds: pa.Array, successors: pa.Array) -> pa.Array:
        """Return why each file is kept; null if nothing needs it. The first reason counts."""
        is_rejected = pc.equal(kinds, REJECTED)
        whole = keys.filter(pc.invert(self._with_verdict(REJECT)))
        table_ids = as_array(self.files["table_id"])
        own = pc.is_in(table_ids, value_set=pa.array(sorted(self.own_table), pa.string()))
        made = pc.is_in(table_ids, value_set=pa.array(sorted(self.others), pa.string()))
        requested = pa.array([], pa.string()) if self.requested is None else self.requested
        certain = pc.or_(pc.is_in(keys, value_set=self.left), own)
        reasons = {
            _NOT_CERTAIN: pc.invert(certain),
            _OF_OTHERS: pc.invert(pc.or_(own, made)),
            _NO_SUCCESSOR: pc.and_(
                pc.is_valid(successors), pc.invert(pc.is_in(successors, value_set=whole))
            ),
            _REQUESTED: pc.is_in(keys, value_set=requested),
            _KEPT: self._with_verdict(KEEP),
        }
        why = pa.nulls(len(keys), pa.string())
        for reason, applies in reasons.items():
            why = pc.if_else(applies, reason, why)
        why = pc.if_else(is_rejected.fill_null(False), pa.scalar(None, pa.string()), why)
        return pc.if_else(pc.is_in(keys, value_set=self.accepted), _ACCEPTED, why)


def _enter(journal: Journal, images: pa.Table, root_id: str) -> None:
    at, dead = datetime.now(timezone.utc), journal.claims.dead()
    for why in (REJECTED, REPLACED, UNLISTED):
        keys = images["request_key"].filter(pc.equal(images["why"], why)).to_pylist()
        journal.pruned.add(keys, root_id, why=why, at=at, dead=dead)


def _remove(storage: Storage, names: Sequence[str]) -> None:
    if storage.folder is not None:
        for name in names:
            storage.remove(name)
        return
    with ThreadPoolExecutor(STORE_THREADS) as pool:
        deque(pool.map(storage.remove, names), maxlen=0)  # raises the first error


def _sizes(storage: Storage) -> Iterator[tuple[str, int]]:
    """Yield the names and sizes of the files in images/."""
    if storage.folder is None:
        yield from storage.listed("images/")
        return
    for name in storage.names("images"):
        if (size := storage.size_bytes(name)) is not None:
            yield name, size
