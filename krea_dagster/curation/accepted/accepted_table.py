"""Builds the tables of accepted images from manifests, verdicts, measures and near-duplicates.

``rules`` decides which row is accepted and ``quota`` how many are; this module reads and writes the
files. They can be rebuilt at any time, without network where the storage is local.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.arrow import as_array
from krea_dagster.curation.accepted.candidates import read_slots
from krea_dagster.curation.accepted.quota import (
    SLOT_SCHEMA,
    GroupResult,
    Groups,
    WantedImages,
    decide,
    slot_states,
)
from krea_dagster.curation.accepted.rules import (
    ACCEPTED,
    REJECTED,
    VERDICT_SCHEMA,
    WAITING,
    Evidence,
    Rules,
    judge,
    limit_to_wanted,
    redundant_rows,
    verdict_table,
    verdict_version,
    verdicts_of,
)
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.engine.verdict import KEEP
from krea_dagster.errors import ConfigError
from krea_dagster.manifest import (
    MANIFEST_SCHEMA,
    manifest_name,
    manifest_partitions,
    table_name,
    table_names,
)
from krea_dagster.manifest.files import write_parts
from krea_dagster.parquet_files import open_parquet
from krea_dagster.prompts import PLAN_SCHEMA

#: The columns added to the manifest's, with their descriptions.
ACCEPTED_COLUMNS: Final[Mapping[str, str]] = {
    "verdict": "The last verdict on the image; null without a review",
    "reviewer": "Who gave it",
    "reviewed_at": "When, UTC",
}
_ADDED: Final = [VERDICT_SCHEMA.field(name) for name in ACCEPTED_COLUMNS]
_ROWS: Final = 10_000
_STATES: Final = ("status", "image_sha256", "error_code")
_DUPLICATES: Final = pa.schema(
    [
        ("image_sha256", pa.string()),
        ("partition_key", pa.string()),
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("request_key", pa.string()),
        ("cluster", pa.string()),
        ("keep", pa.bool_()),
        ("distance", pa.int32()),
    ]
)


def has_accepted(storage: Storage, folders: Sequence[str] = ()) -> bool:
    """Return whether a partition has a table of accepted images."""
    return next(iter(table_names(storage, "accepted", folders)), None) is not None


def accepted_name(partition_key: str, folders: Sequence[str] = ()) -> str:
    """Return the name of a partition's accepted images under the storage root."""
    return table_name("accepted", partition_key, folders)


def accepted_schema(manifest: pa.Schema) -> pa.Schema:
    """Return the manifest's columns with ``ACCEPTED_COLUMNS``.

    Raises ConfigError where the prompt table has a column of one of those names.
    """
    if taken := [name for name in ACCEPTED_COLUMNS if name in manifest.names]:
        raise ConfigError(
            f"the prompt table has a column {taken[0]!r}, which is reserved in the tables of "
            "accepted images; rename it in the prompt table"
        )
    return pa.schema([*manifest, *_ADDED])


@dataclass(frozen=True)
class AcceptedPartition:
    """The result of one partition. ``reasons`` counts its rows by why they are accepted or not.

    ``images`` and ``units`` count all purchases for its rows, at all attempts; a purchase that two
    rows share counts once.
    """

    partition_key: str
    path: str
    schema: pa.Schema
    reasons: Counter[str]
    images: int
    units: int

    @property
    def accepted(self) -> int:
        """Return the number of accepted rows."""
        return self.reasons[ACCEPTED]

    @property
    def rejected(self) -> int:
        """Return the number of rows rejected in a review."""
        return self.reasons[REJECTED]

    @property
    def waiting(self) -> int:
        """Return the number of rows that still need a verdict or a measure."""
        return sum(self.reasons[reason] for reason in WAITING)


@dataclass(frozen=True)
class AcceptedTableBuilder:
    """Builds the tables for the manifests in ``folders``; ``verdicts`` are the present ones."""

    storage: Storage
    journal: Journal
    rules: Rules
    wanted: WantedImages | None
    verdicts: pa.Table
    folders: Sequence[str] = ()

    @classmethod
    def read(
        cls,
        storage: Storage,
        journal: Journal,
        rules: Rules,
        wanted: WantedImages | None = None,
        folders: Sequence[str] = (),
    ) -> AcceptedTableBuilder:
        """Read the current verdicts. Raises JournalError."""
        verdicts = verdict_table(journal.verdicts.current().values())
        return cls(storage, journal, rules, wanted, verdicts, folders)

    # -- reading -----------------------------------------------------------------------------

    def evidence(self) -> Evidence:
        """Read what the rules need in addition to the rows. Raises ConfigError."""
        measures = redundant = None
        if self.rules.ranges:
            measures = self._read("measures", ["image_sha256", *self.rules.measures])
        if self.rules.one_of_duplicates:
            redundant = redundant_rows(
                self._duplicates(), self.verdicts, require_keep=self.rules.require_keep
            )
        return Evidence(self.verdicts, measures, redundant)

    def versions(self, partition_keys: Iterable[str]) -> dict[str, str]:
        """Return a version of the verdicts on each partition's images.

        Where only one of similar images is accepted, the verdicts on those count too. Partitions
        without a manifest have the version of no verdict.
        """
        similar: dict[str, pa.Array] = {}
        if self.rules.one_of_duplicates:
            similar = _similar_images(self._duplicates())
        judged = self.verdicts["image_sha256"]
        found = {}
        for key in partition_keys:
            parts = [similar[key]] if key in similar else []
            for batch in self.batches(key, ["image_sha256"]):
                images = batch.column(0)
                parts.append(images.filter(pc.is_in(images, value_set=as_array(judged))))
            images = pa.concat_arrays([pa.array([], pa.string()), *parts])
            found[key] = verdict_version(images, self.verdicts)
        return found

    def partitions(self) -> list[str]:
        """Return the partitions that have a manifest."""
        return manifest_partitions(self.storage, self.folders)

    def batches(self, key: str, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a partition's manifest; none where there is no file."""
        try:
            file = self.storage.open(manifest_name(key, self.folders))
        except FileNotFoundError:
            return
        with file:
            parquet = open_parquet(file)
            wanted = columns
            if columns is not None:
                # The caller reports columns that the table lacks.
                wanted = [name for name in columns if name in parquet.schema_arrow.names]
            yield from parquet.iter_batches(_ROWS, columns=wanted)

    # -- writing -----------------------------------------------------------------------------

    def make(
        self, partition_keys: Sequence[str]
    ) -> tuple[list[AcceptedPartition], list[GroupResult]]:
        """Write the accepted images of these partitions, each atomically.

        Return the partitions, and the result of each group with a wanted number: the groups of
        these partitions, or where values of a column are counted, of all. Raises ConfigError and
        JournalError.
        """
        evidence = self.evidence()
        groups = [[key] for key in partition_keys]
        if self.wanted is not None and self.wanted.column:
            groups = [sorted({*self.partitions(), *partition_keys})]
        made: dict[str, AcceptedPartition] = {}
        results: list[GroupResult] = []
        for keys in groups:
            slots, spans = self.slots(keys)
            reasons, found = self._judge(slots, evidence)
            results += found
            for key in partition_keys:
                if key in spans:
                    made[key] = self._write(
                        key, slots.slice(*spans[key]), reasons.slice(*spans[key])
                    )
        return [made[key] for key in partition_keys], results

    def slots(self, keys: Sequence[str]) -> tuple[pa.Table, dict[str, tuple[int, int]]]:
        """Return the slots of these partitions, and the first and the number of each one's."""
        column = "" if self.wanted is None else self.wanted.column
        names = list(dict.fromkeys([*PLAN_SCHEMA.names, *_STATES, *([column] if column else [])]))
        prices = self.journal.prices.highest()
        tables, places, start = [SLOT_SCHEMA.empty_table()], {}, 0
        for key in keys:
            table = read_slots(self.batches(key, names), self.journal, column=column, prices=prices)
            places[key] = (start, table.num_rows)
            start += table.num_rows
            tables.append(table)
        return pa.concat_tables(tables), places

    def _judge(self, slots: pa.Table, evidence: Evidence) -> tuple[pa.Array, list[GroupResult]]:
        reasons = judge(slots, self.rules, evidence)
        if self.wanted is None:
            return reasons, []
        groups = Groups.by(self.wanted, slots)
        images = as_array(slots["image_sha256"])
        verdicts = as_array(verdicts_of(images, self.verdicts, ["verdict"])["verdict"])
        limited = limit_to_wanted(
            reasons,
            slots,
            groups.of,
            self.wanted.numbers(groups.names),
            kept=pc.equal(verdicts, KEEP),
        )
        return limited, list(decide(self.wanted, slots, slot_states(slots, reasons)).outcomes)

    def _write(self, key: str, slots: pa.Table, reasons: pa.Array) -> AcceptedPartition:
        name = accepted_name(key, self.folders)
        schema = accepted_schema(self._manifest_schema(key))
        mask = pc.equal(reasons, ACCEPTED)
        keys = slots["request_key"]

        def parts() -> Iterator[pa.Table]:
            start = 0
            for batch in self.batches(key, None):
                here = slice(start, start + batch.num_rows)
                start = here.stop
                if batch.column("request_key").to_pylist() != keys[here].to_pylist():
                    raise _rewritten(key)
                rows = pa.Table.from_batches([batch.filter(mask[here])])
                images = as_array(rows["image_sha256"])
                verdicts = verdicts_of(images, self.verdicts, list(ACCEPTED_COLUMNS))
                yield pa.Table.from_arrays([*rows.columns, *verdicts.columns], schema=schema)
            if start != len(keys):
                raise _rewritten(key)

        self.storage.write(name, lambda file: write_parts(file, schema, parts()))
        _, first = np.unique(
            np.asarray(as_array(keys).dictionary_encode().indices), return_index=True
        )
        return AcceptedPartition(
            key,
            self.storage.locate(name),
            schema,
            Counter(reasons.to_pylist()),
            int(np.asarray(slots["bought_images"])[first].sum()),
            int(np.asarray(slots["bought_units"])[first].sum()),
        )

    def _manifest_schema(self, key: str) -> pa.Schema:
        try:
            with self.storage.open(manifest_name(key, self.folders)) as file:
                return open_parquet(file).schema_arrow
        except FileNotFoundError:
            return MANIFEST_SCHEMA

    # -- other tables ------------------------------------------------------------------------

    def _duplicates(self) -> pa.Table:
        return self._read("near_duplicates", _DUPLICATES.names).cast(_DUPLICATES)

    def _read(self, kind: str, columns: Sequence[str]) -> pa.Table:
        """Read these columns of all files of a kind, such as ``measures``."""
        tables = []
        for name in sorted(table_names(self.storage, kind, self.folders)):
            with self.storage.open(name) as file:
                names = open_parquet(file).schema_arrow.names
                if missing := [column for column in columns if column not in names]:
                    raise ConfigError(
                        f"{self.storage.locate(name)} has no column {missing[0]!r}; it has "
                        f"{', '.join(names)}. Correct the rules of accepted images, or "
                        f"materialize the asset that makes the file again."
                    )
                tables.append(open_parquet(file).read(columns=list(columns)))
        if tables:
            return pa.concat_tables(tables, promote_options="permissive").combine_chunks()
        known = {field.name: field.type for field in _DUPLICATES}
        return pa.schema([(name, known.get(name, pa.float64())) for name in columns]).empty_table()


def _similar_images(duplicates: pa.Table) -> dict[str, pa.Array]:
    """Return for each partition the images of all clusters with an image in it."""
    pairs = pa.table(
        {"cluster": duplicates["cluster"], "partition_key": duplicates["partition_key"]}
    )
    pairs = pairs.group_by(["cluster", "partition_key"]).aggregate([])
    joined = pairs.join(duplicates.select(["cluster", "image_sha256"]), "cluster")
    found = {}
    for key in pc.unique(joined["partition_key"]).to_pylist():
        mask = pc.equal(joined["partition_key"], key)
        found[str(key)] = as_array(joined["image_sha256"].filter(mask))
    return found


def _rewritten(key: str) -> ConfigError:
    return ConfigError(
        f"the manifest of {key} was rewritten while its accepted images were built; materialize "
        "them again"
    )
