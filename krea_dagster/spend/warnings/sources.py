"""Open the sources of the warnings and the report: the spend tables, and the account."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.spend.proof.account import AccountComparison, AccountProof
from krea_dagster.spend.tables.daily import DAILY_SCHEMA, FAILURES_SCHEMA
from krea_dagster.spend.tables.ledger import LEDGER_SCHEMA
from krea_dagster.spend.tables.query import stored_table
from krea_dagster.spend.warnings.load_history import Table


@dataclass(frozen=True)
class SpendTables:
    """The three spend tables, empty without files, and their number of months."""

    ledger: Table
    daily: Table
    failures: Table
    months: int


def stored_tables(storage: Storage) -> SpendTables:
    """Open the spend tables. Raises OSError."""
    return SpendTables(
        stored_table(storage, "spend/ledger", LEDGER_SCHEMA),
        stored_table(storage, "spend/daily", DAILY_SCHEMA),
        stored_table(storage, "spend/failures", FAILURES_SCHEMA),
        months=sum(name.endswith(".parquet") for name in storage.names("spend/ledger")),
    )


def account_proof(journal: Journal) -> AccountProof | None:
    """Compare the account's readings with the journal's charges; None for fewer than two.

    Reads every charge: microseconds each. Raises JournalError.
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
    """Read the prompts of a few prompt_ids from the manifests. Raises OSError."""
    names = [name for name in storage.names("manifest") if name.endswith(".parquet")]
    if not names or not prompt_ids:
        return {}
    found = [fsspec.core.url_to_fs(storage.locate(name)) for name in names]
    schema = pa.schema([("prompt_id", pa.string()), ("prompt", pa.string())])
    paths = [path for _, path in found]
    manifests = ds.dataset(paths, schema=schema, format="parquet", filesystem=found[0][0])
    wanted = pc.field("prompt_id").isin(list(prompt_ids))
    rows = manifests.to_table(filter=wanted).to_pydict()
    return dict(zip(rows["prompt_id"], rows["prompt"], strict=True))
