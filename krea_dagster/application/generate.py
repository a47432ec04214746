"""Buys the images of a few prompts that are given in Python, without a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pyarrow as pa

from krea_dagster.application.backend import Backend
from krea_dagster.application.batch import Batch
from krea_dagster.application.present_partitions import origin_of
from krea_dagster.application.purchase import buy
from krea_dagster.engine.journal.prompt_table_log import GENERATED
from krea_dagster.engine.run.report import Progress
from krea_dagster.manifest import add_rows
from krea_dagster.prompts import Defaults, PromptTable, parse_partition_by
from krea_dagster.prompts.sources import Given
from krea_dagster.prompts.values import stream_of

#: What ``generate`` takes: texts, rows by column, or a table (of pandas, Polars, Arrow or DuckDB).
Prompts = Any

_SHOWN: Final = "the given prompts"
_ALL: Final = parse_partition_by("column:partition_key_of_these")


def generate(
    backend: Backend,
    prompts: Prompts,
    *,
    run_id: str,
    name: str,
    defaults: Defaults | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> pa.Table:
    """Buy, fetch and verify the images of some prompts, and return their manifest.

    Args:
        prompts: Texts, or rows with the columns of a prompt table, or a table (pandas, Polars,
            Arrow or DuckDB).
        run_id: Is written with every purchase.
        name: The partition key in the manifest, such as the name of the asset.
        defaults: Values for what a row leaves open.
        on_progress: Is called on the event loop whenever something changed.

    Returns:
        The manifest: a row for each requested image, also if it is missing (``status`` and
        ``error_message`` then say why).

    Raises:
        ConfigError, PromptTableError: before anything is bought.
        AccountStopped, RunStopped: if buying stopped. The next call takes up what is paid for.
        JournalError, StorageError: if what was bought could not be written.
    """
    rows = stream_of(prompts, _SHOWN).read_all()
    # The column is in this table only; in the manifest the name takes its place.
    keys = pa.repeat(pa.scalar(name, pa.string()), rows.num_rows)
    table = PromptTable(
        Given(rows.append_column(_ALL.columns[0], keys), _SHOWN),
        _ALL,
        defaults=defaults or Defaults(),
        name=f"{GENERATED}{name}",
    )
    with Batch.read(table, [name], backend, to_buy=True, look=True) as batch:
        state = batch.state(backend)
        report = buy(
            backend,
            state.wanted(),
            run_id=run_id,
            table=table,
            reused_rows=int(state.intact.sum()),
            on_progress=on_progress,
        )
        with backend.open_journal() as journal:
            parts = list(batch.manifest_parts(name, backend, journal, run_id))
        found = pa.concat_tables(parts) if parts else batch.manifest_schema.empty_table()
        found = found.drop_columns(list(_ALL.columns))
        add_rows(backend.open_storage(), f"{GENERATED}{name}", found, origin_of(backend, table))
        if report.stopped is not None:
            raise report.stopped
        return found
