"""Images for a few prompts at hand, without a table: the layer below the assets."""

import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq

from krea_dagster.application.batch import Batch
from krea_dagster.engine.run.report import Progress
from krea_dagster.errors import ConfigError, PromptTableError
from krea_dagster.prompts import Defaults, PromptTable, parse_partition_by

if TYPE_CHECKING:
    from krea_dagster.plugin.resource import KreaResource

#: What ``generate`` takes: texts, rows by column, or a table (of pandas, Polars or Arrow).
Prompts = Any

_ALL: Final = parse_partition_by("column:partition_key_of_these")


def generate(
    krea: "KreaResource",
    prompts: Prompts,
    *,
    run_id: str,
    name: str,
    defaults: Defaults | None,
    on_progress: Callable[[Progress], None],
) -> pa.Table:
    """Do what ``KreaResource.generate`` says."""
    rows = _as_table(prompts)
    with TemporaryDirectory(prefix="krea-prompts-") as folder:
        file = Path(folder, "prompts.parquet")
        # The column is of this file only: what is bought is told by the asset's or op's name.
        own = pa.repeat(pa.scalar(name, pa.string()), rows.num_rows)
        pq.write_table(rows.append_column(_ALL.columns[0], own), file)
        table = PromptTable(
            str(file), _ALL, defaults=defaults or Defaults(), name=f"generate:{name}"
        )
        try:
            batch = Batch.read(table, [name], krea, to_buy=True, look=True)
        except PromptTableError as error:
            raise PromptTableError("the given prompts", error.problems, error.count) from None
        with closing(batch):
            standing = batch.standing(krea)
            report = krea.carry(
                standing.wanted(),
                run_id=run_id,
                table=table,
                reused_rows=int(standing.whole.sum()),
                on_progress=on_progress,
            )
            if report.stopped is not None:
                raise report.stopped
            with krea.open_journal() as journal:
                parts = list(batch.manifest_parts(name, krea, journal, run_id))
            schema = batch.manifest_schema
            found = pa.concat_tables(parts) if parts else schema.empty_table()
            return found.drop_columns(list(_ALL.columns))


def ids_of(context: dg.OpExecutionContext | dg.AssetExecutionContext | None) -> tuple[str, str]:
    """The run that buys, and the name under which: the asset's, or the op's."""
    if context is None:
        return f"without-dagster-{uuid.uuid4()}", "generate"
    if isinstance(context, dg.AssetExecutionContext):
        return context.run.run_id, context.asset_key.to_user_string()
    return context.run_id, context.op_def.name


def _as_table(prompts: Prompts) -> pa.Table:
    if isinstance(prompts, str | Mapping):
        raise TypeError("prompts is a list of texts or rows, or a table; not one of them")
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
