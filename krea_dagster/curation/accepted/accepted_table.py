"""Makes the tables of accepted images from manifests, verdicts, measures and likeness.

``accepted`` (pure) says which row is accepted, ``wanted`` (pure) how many are taken; here the
files are read and written. Nothing needs the network, and all can be made again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

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
    redundant_rows,
    take,
    verdict_table,
    verdict_version,
    verdicts_of,
)
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.engine.verdict import KEEP
from krea_dagster.errors import ConfigError
from krea_dagster.manifest import MANIFEST_SCHEMA, manifest_name, manifest_names
from krea_dagster.manifest.files import write_parts
from krea_dagster.prompts import PLAN_SCHEMA, safe_name

#: What is added to the manifest's columns, and what it means.
ACCEPTED_COLUMNS: Final[Mapping[str, str]] = {
    "verdict": "What a person has said of the image last; null where nobody has",
    "reviewer": "Who",
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


def accepted_name(partition_key: str, folders: Sequence[str] = ()) -> str:
    """The name of a partition's accepted images under the storage root."""
    return "/".join(["accepted", *map(safe_name, folders), f"{safe_name(partition_key)}.parquet"])


def accepted_schema(manifest: pa.Schema) -> pa.Schema:
    """Return the manifest's columns, the table's further ones, and ``ACCEPTED_COLUMNS``.

    Raises ConfigError where the prompt table has a column of one of those names.
    """
    if taken := [name for name in ACCEPTED_COLUMNS if name in manifest.names]:
        raise ConfigError(
            f"the prompt table has a column {taken[0]!r}, which accepted images have of their "
            "own; rename it in the table"
        )
    return pa.schema([*manifest, *_ADDED])


@dataclass(frozen=True)
class Accepted:
    """What one partition came to. ``reasons`` counts its rows by why they are accepted or not.

    ``units`` are what was bought for its rows, at all their attempts; a purchase that two rows
    share counts once.
    """

    partition_key: str
    path: str
    schema: pa.Schema
    reasons: Counter[str]
    images: int
    units: int

    @property
    def accepted(self) -> int:
        """Rows that are accepted."""
        return self.reasons[ACCEPTED]

    @property
    def rejected(self) -> int:
        """Rows that a person has rejected."""
        return self.reasons[REJECTED]

    @property
    def waiting(self) -> int:
        """Rows of which somebody, or a measure, has still to say."""
        return sum(self.reasons[reason] for reason in WAITING)


@dataclass(frozen=True)
class AcceptedTableBuilder:
    """Makes accepted images of the manifests in ``folders``; ``verdicts`` are the present ones."""

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
        """Read the verdicts as they are now. Raises JournalError."""
        verdicts = verdict_table(journal.verdicts.current().values())
        return cls(storage, journal, rules, wanted, verdicts, folders)

    # -- what is known -----------------------------------------------------------------------

    def evidence(self) -> Evidence:
        """Read what the rules need beside the rows. Raises ConfigError."""
        measures = spare = None
        if self.rules.ranges:
            measures = self._read("measures", ["image_sha256", *self.rules.measures])
        if self.rules.one_of_duplicates:
            spare = redundant_rows(
                self._duplicates(), self.verdicts, require_keep=self.rules.require_keep
            )
        return Evidence(self.verdicts, measures, spare)

    def versions(self, partition_keys: Iterable[str]) -> dict[str, str]:
        """Return a version of what people think of each partition's images.

        Where only one of images that are alike is accepted, what they think of those counts too.
        Partitions without a manifest have the version of no verdict.
        """
        alike: dict[str, pa.Array] = {}
        if self.rules.one_of_duplicates:
            alike = _images_alike(self._duplicates())
        judged = self.verdicts["image_sha256"]
        found = {}
        for key in partition_keys:
            parts = [alike[key]] if key in alike else []
            for batch in self.batches(key, ["image_sha256"]):
                images = batch.column(0)
                parts.append(images.filter(pc.is_in(images, value_set=judged.combine_chunks())))
            images = pa.concat_arrays([pa.array([], pa.string()), *parts])
            found[key] = verdict_version(images, self.verdicts)
        return found

    def partitions(self) -> list[str]:
        """The partitions that have a manifest, as their files say."""
        keys = []
        for name in manifest_names(self.storage, self.folders):
            with self.storage.open(name) as file:
                for batch in pq.ParquetFile(file).iter_batches(1, columns=["partition_key"]):
                    keys.append(str(batch.column(0)[0].as_py()))
                    break
        return sorted(keys)

    def batches(self, key: str, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a partition's manifest; none where there is no file yet."""
        try:
            file = self.storage.open(manifest_name(key, self.folders))
        except FileNotFoundError:
            return
        with file:
            parquet = pq.ParquetFile(file)
            wanted = columns
            if columns is not None:
                # What the table has no column of is said by whoever reads it.
                wanted = [name for name in columns if name in parquet.schema_arrow.names]
            yield from parquet.iter_batches(_ROWS, columns=wanted)

    # -- what is made ------------------------------------------------------------------------

    def make(self, partition_keys: Sequence[str]) -> tuple[list[Accepted], list[GroupResult]]:
        """Write the accepted images of these partitions, each atomically; returns what they are.

        And how each group that a number is wanted of stands: those of these partitions, or where
        values of a column are counted, all. Raises ConfigError and JournalError.
        """
        evidence = self.evidence()
        made: list[Accepted] = []
        outcomes: list[GroupResult] = []
        if self.wanted is not None and self.wanted.column:
            every = sorted({*self.partitions(), *partition_keys})
            slots, of_each = self.slots(every)
            reasons, outcomes = self._judge(slots, evidence)
            made = [
                self._write(key, slots.slice(*of_each[key]), reasons.slice(*of_each[key]))
                for key in partition_keys
            ]
            return made, outcomes
        for key in partition_keys:
            slots, _ = self.slots([key])
            reasons, found = self._judge(slots, evidence)
            made.append(self._write(key, slots, reasons))
            outcomes += found
        return made, outcomes

    def slots(self, keys: Sequence[str]) -> tuple[pa.Table, dict[str, tuple[int, int]]]:
        """Read the slots of these partitions, and where each begins and how many it has."""
        column = "" if self.wanted is None else self.wanted.column
        names = list(dict.fromkeys([*PLAN_SCHEMA.names, *_STATES, *([column] if column else [])]))
        prices = self.journal.highest_prices()
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
        images = slots["image_sha256"].combine_chunks()
        verdicts = verdicts_of(images, self.verdicts, ["verdict"])["verdict"].combine_chunks()
        taken = take(
            reasons,
            slots,
            groups.of,
            self.wanted.numbers(groups.names),
            kept=pc.equal(verdicts, KEEP),
        )
        return taken, list(decide(self.wanted, slots, slot_states(slots, reasons)).outcomes)

    def _write(self, key: str, slots: pa.Table, reasons: pa.Array) -> Accepted:
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
                images = rows["image_sha256"].combine_chunks()
                said = verdicts_of(images, self.verdicts, list(ACCEPTED_COLUMNS))
                yield pa.Table.from_arrays([*rows.columns, *said.columns], schema=schema)
            if start != len(keys):
                raise _rewritten(key)

        self.storage.write(name, lambda file: write_parts(file, schema, parts()))
        _, first = np.unique(
            np.asarray(keys.combine_chunks().dictionary_encode().indices), return_index=True
        )
        return Accepted(
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
                return pq.ParquetFile(file).schema_arrow
        except FileNotFoundError:
            return MANIFEST_SCHEMA

    # -- the tables beside -------------------------------------------------------------------

    def _duplicates(self) -> pa.Table:
        return self._read("near_duplicates", _DUPLICATES.names).cast(_DUPLICATES)

    def _read(self, kind: str, columns: Sequence[str]) -> pa.Table:
        """Read these columns of all files of a kind, such as measures."""
        home = "/".join([kind, *map(safe_name, self.folders)])
        tables = []
        for name in sorted(self.storage.names(home)):
            if name.rpartition("/")[0] != home or not name.endswith(".parquet"):
                continue
            with self.storage.open(name) as file:
                there = pq.ParquetFile(file).schema_arrow.names
                if missing := [column for column in columns if column not in there]:
                    raise ConfigError(
                        f"{self.storage.locate(name)} has no column {missing[0]!r}; it has "
                        f"{', '.join(there)}. Correct the rules of accepted images, or "
                        f"materialize the asset that makes the file again."
                    )
                tables.append(pq.read_table(file, columns=list(columns)))
        if tables:
            return pa.concat_tables(tables, promote_options="permissive").combine_chunks()
        known = {field.name: field.type for field in _DUPLICATES}
        return pa.schema([(name, known.get(name, pa.float64())) for name in columns]).empty_table()


def _images_alike(duplicates: pa.Table) -> dict[str, pa.Array]:
    """Return for each partition the images of all clusters that reach into it."""
    pairs = pa.table(
        {"cluster": duplicates["cluster"], "partition_key": duplicates["partition_key"]}
    )
    pairs = pairs.group_by(["cluster", "partition_key"]).aggregate([])
    joined = pairs.join(duplicates.select(["cluster", "image_sha256"]), "cluster")
    found = {}
    for key in pc.unique(joined["partition_key"]).to_pylist():
        mask = pc.equal(joined["partition_key"], key)
        found[str(key)] = joined["image_sha256"].filter(mask).combine_chunks()
    return found


def _rewritten(key: str) -> ConfigError:
    return ConfigError(
        f"the manifest of {key} was written anew while its accepted images were made; "
        "materialize them again"
    )
