"""Opens what the warnings and the report are made of: the spend tables on file, and the account."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.spend.proof.account import AccountComparison, AccountProof
from krea_dagster.spend.tables.daily import DAILY_SCHEMA, FAILURES_SCHEMA
from krea_dagster.spend.tables.ledger import LEDGER_SCHEMA
from krea_dagster.spend.warnings.load_history import Table


@dataclass(frozen=True)
class SpendTables:
    """The three tables of the spend folder; empty ones where there are no files."""

    ledger: Table
    daily: Table
    failures: Table
    months: int


def stored_tables(storage: Storage) -> SpendTables:
    """Open the tables; rows are read when they are asked for. Raises OSError."""
    ledger, months = _table(storage, "ledger", LEDGER_SCHEMA)
    daily, _ = _table(storage, "daily", DAILY_SCHEMA)
    failures, _ = _table(storage, "failures", FAILURES_SCHEMA)
    return SpendTables(ledger, daily, failures, months)


def account_proof(journal: Journal) -> AccountProof | None:
    """Hold the account's readings against the journal's charges; None where there is only one.

    Reads every charge, one by one: microseconds each. Raises JournalError.
    """
    with journal.snapshot() as snapshot:
        readings = snapshot.account_readings()
        if len(readings) < 2:
            return None
        comparison = AccountComparison(readings)
        for charge in snapshot.charges():
            comparison.add(charge)
    return comparison.proof()


def prompt_texts(storage: Storage, prompt_ids: Sequence[str]) -> Mapping[str, str]:
    """Look up the prompts of a few prompt_ids in the manifests on file. Raises OSError."""
    manifests, months = _dataset(storage, "manifest", _TEXTS)
    if not months or not prompt_ids:
        return {}
    wanted = pc.field("prompt_id").isin(list(prompt_ids))
    found = manifests.to_table(columns=_TEXTS.names, filter=wanted).to_pydict()
    return dict(zip(found["prompt_id"], found["prompt"], strict=True))


_TEXTS: Final = pa.schema([("prompt_id", pa.string()), ("prompt", pa.string())])


def _table(storage: Storage, table: str, schema: pa.Schema) -> tuple[Table, int]:
    """Open a table with the columns that its files have: all are made with the same."""
    folder = f"spend/{table}"
    names = [name for name in storage.names(folder) if name.endswith(".parquet")]
    if names:
        with storage.open(max(names)) as file:
            schema = pq.read_schema(file).remove_metadata()
    return _dataset(storage, folder, schema)


def _dataset(storage: Storage, folder: str, schema: pa.Schema) -> tuple[Table, int]:
    """Open the Parquet files of a folder as one table, and say how many there are."""
    names = sorted(name for name in storage.names(folder) if name.endswith(".parquet"))
    if not names:
        return schema.empty_table(), 0
    found = [fsspec.core.url_to_fs(storage.locate(name)) for name in names]
    paths, fs = [path for _, path in found], found[0][0]
    return ds.dataset(paths, schema=schema, format="parquet", filesystem=fs), len(paths)
