"""Curation: which images are accepted, how many are wanted, and the tables made of that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import pyarrow as pa

from krea_dagster.application.backend import Backend
from krea_dagster.curation.accepted.accepted_table import AcceptedPartition, AcceptedTableBuilder
from krea_dagster.curation.accepted.quota import GroupResult, WantedImages
from krea_dagster.curation.accepted.rules import Rules
from krea_dagster.curation.export.spec import ExportSpec
from krea_dagster.curation.export.table_batches import verdict_columns
from krea_dagster.curation.measures.custom import Measure
from krea_dagster.curation.measures.measure_partitions import MeasuredPartition, measure_partitions
from krea_dagster.curation.similarity.near_duplicates import (
    NearDuplicateSummary,
    update_near_duplicates,
)
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.verdict_log import VerdictLog
from krea_dagster.engine.verdict import FLAG, REJECT
from krea_dagster.errors import ConfigError


@dataclass(frozen=True)
class Curation:
    """Which images are accepted, how many are wanted, and what is measured of them.

    Args:
        measures: Custom measures, in addition to the built-in ones.
        accept: Bounds of measures, such as ``sharpness>=40``.
        require_keep: Accept only images that a person kept, instead of all except rejected and
            flagged ones.
        one_of_duplicates: Accept only the best of near-duplicate images.
        wanted: How many accepted images are wanted: ``prompt=3`` of each prompt,
            ``column:NAME=500`` of each value of a column, ``column:NAME:VALUE=20`` of one value.
            Runs regenerate what was not accepted until the number is reached.
        most_images: Maximum number of images bought for each prompt or value.
        most_credits: Maximum credits spent on each prompt or value.
        exports: Datasets of the accepted images; each becomes an asset of that name.

    Raises:
        ConfigError: for a malformed bound or number.
    """

    measures: Sequence[Measure] = ()
    accept: Sequence[str] = ()
    require_keep: bool = False
    one_of_duplicates: bool = False
    wanted: Sequence[str] = ()
    most_images: int | None = None
    most_credits: float | None = None
    exports: Mapping[str, ExportSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _ = self.rules, self.wanted_images  # so that errors are raised where they are written

    @cached_property
    def rules(self) -> Rules:
        """The rules that an accepted image meets."""
        return Rules.parse(
            self.accept,
            require_keep=self.require_keep,
            one_of_duplicates=self.one_of_duplicates,
        )

    @cached_property
    def wanted_images(self) -> WantedImages | None:
        """How many accepted images are wanted, and of what."""
        return WantedImages.parse(
            self.wanted, most_images=self.most_images, most_credits=self.most_credits
        )


@dataclass(frozen=True)
class Curated:
    """The tables that ``curate`` wrote: measures and accepted images by partition, duplicates.

    ``outcomes`` says for each group with a quota how many images are accepted.
    """

    measured: Sequence[MeasuredPartition]
    duplicates: NearDuplicateSummary
    accepted: Sequence[AcceptedPartition]
    outcomes: Sequence[GroupResult]


def curate(
    backend: Backend, curation: Curation | None = None, *, folders: Sequence[str] = ()
) -> Curated:
    """Measure all stored images, find near-duplicates, and write the accepted images.

    ``folders`` are those of the manifests. Raises ConfigError, JournalError or StorageError.
    """
    curation = curation or Curation()
    storage = backend.open_storage()
    if not backend.has_journal():
        raise ConfigError(f"{storage.shown('')} has no journal yet, and so no image")
    with backend.open_journal() as journal:
        accepting = AcceptedTableBuilder.read(
            storage, journal, curation.rules, curation.wanted_images, folders
        )
        keys = accepting.partitions()
        measured = list(
            measure_partitions(storage, keys, folders=folders, custom=curation.measures)
        )
        verdicts = {sha256: one.verdict for sha256, one in journal.verdicts.current().items()}
        duplicates = update_near_duplicates(storage, folders, verdicts=verdicts)
        accepted, outcomes = accepting.make(keys)
    return Curated(measured, duplicates, accepted, outcomes)


@contextmanager
def _open_known_journal(backend: Backend) -> Iterator[Journal | None]:
    """Open the journal; None if there is none."""
    # A storage root behind a URL may have no journal that is known here.
    known = backend.settings.journal_url or backend.open_storage().folder is not None
    if not known or not backend.has_journal():
        yield None
        return
    with backend.open_journal() as journal:
        yield journal


@contextmanager
def open_verdicts(backend: Backend) -> Iterator[VerdictLog | None]:
    """Open the verdicts of the journal; None if there is no journal."""
    with _open_known_journal(backend) as journal:
        yield None if journal is None else journal.verdicts


def images_origin(backend: Backend) -> str:
    """Return where the images come from: a host, or "an emulator"; empty where it is not known."""
    with _open_known_journal(backend) as journal:
        return "" if journal is None else journal.origin()


def refused_images(backend: Backend) -> frozenset[str]:
    """Return the sha256 of the images whose last verdict is reject or flag."""
    with open_verdicts(backend) as log:
        if log is None:
            return frozenset()
        current = log.current().items()
        return frozenset(sha256 for sha256, one in current if one.verdict in (REJECT, FLAG))


def verdicts_to_export(backend: Backend) -> pa.Table:
    """Return the current verdicts as columns of an export."""
    with open_verdicts(backend) as log:
        return verdict_columns([] if log is None else log.current().values())


def current_verdicts(backend: Backend) -> dict[str, str] | None:
    """Return the current verdict by the image's sha256; None without a journal."""
    with open_verdicts(backend) as log:
        if log is None:
            return None
        return {sha256: one.verdict for sha256, one in log.current().items()}
