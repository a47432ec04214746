"""Buys the images of a few prompts that are given in Python, without a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from krea_dagster.application.backend import Backend
from krea_dagster.application.batch import Batch
from krea_dagster.application.purchase import buy
from krea_dagster.engine.journal.prompt_table_log import GENERATED
from krea_dagster.engine.run.report import Progress
from krea_dagster.errors import ConfigError, PromptTableError
from krea_dagster.prompts import Defaults, PromptTable, parse_partition_by

#: What ``generate`` takes: texts, rows by column, or a table (of pandas, Polars or Arrow).
Prompts = Any

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
        prompts: Texts, or rows with the columns of a prompt table, or a table (pandas, Polars or
            Arrow).
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
    rows = _as_table(prompts)
    with TemporaryDirectory(prefix="krea-prompts-") as folder:
        file = Path(folder, "prompts.parquet")
        # The column is in this file only; in the manifest the name takes its place.
        keys = pa.repeat(pa.scalar(name, pa.string()), rows.num_rows)
        pq.write_table(rows.append_column(_ALL.columns[0], keys), file)
        table = PromptTable(
            str(file), _ALL, defaults=defaults or Defaults(), name=f"{GENERATED}{name}"
        )
        try:
            batch = Batch.read(table, [name], backend, to_buy=True, look=True)
        except PromptTableError as error:
            raise PromptTableError("the given prompts", error.problems, error.count) from None
        with batch:
            state = batch.state(backend)
            report = buy(
                backend,
                state.wanted(),
                run_id=run_id,
                table=table,
                reused_rows=int(state.intact.sum()),
                on_progress=on_progress,
            )
            if report.stopped is not None:
                raise report.stopped
            with backend.open_journal() as journal:
                parts = list(batch.manifest_parts(name, backend, journal, run_id))
            found = pa.concat_tables(parts) if parts else batch.manifest_schema.empty_table()
            return found.drop_columns(list(_ALL.columns))


def _as_table(prompts: Prompts) -> pa.Table:
    if isinstance(prompts, str | Mapping):
        raise TypeError("prompts is a list of texts or rows, or a table; not one text or row")
    if isinstance(prompts, pa.Table):
        return prompts
    if hasattr(prompts, "__arrow_c_stream__"):
        return pa.table(prompts)
    rows = [{"prompt": row} if isinstance(row, str) else dict(row) for row in _listed(prompts)]
    names = dict.fromkeys(name for row in rows for name in row) or {"prompt": None}
    columns: dict[str, pa.Array] = {}
    for column in names:
        cells = [row.get(column) for row in rows]
        try:
            columns[column] = pa.array(cells)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ConfigError(
                f"the column {column} of the given prompts has cells of several types: {error}. "
                "Nothing was bought."
            ) from error
    if not rows:
        columns["prompt"] = pa.array([], pa.string())
    return pa.table(columns)


def _listed(prompts: Iterable[Any]) -> Iterable[str | Mapping[str, Any]]:
    for number, row in enumerate(prompts, 1):
        if not isinstance(row, str | Mapping):
            raise TypeError(f"prompt {number} is a {type(row).__name__}, not a text or a row")
        yield row
