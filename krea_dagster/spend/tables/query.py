"""Queries of the spend tables: sums by any column, and SQL over read-only views."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import date
from fractions import Fraction
from functools import partial
from typing import Any, Final

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from typing_extensions import Self

from krea_dagster import redact
from krea_dagster.engine.journal.balance_log import AccountHistory
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError, KreaError
from krea_dagster.file_systems import Options, open_for_arrow, open_url
from krea_dagster.manifest import MANIFEST_SCHEMA, present_manifests
from krea_dagster.parquet_files import open_parquet
from krea_dagster.spend.prices import CreditPrice
from krea_dagster.spend.tables.balance import balance_table
from krea_dagster.spend.tables.daily import DAILY_SCHEMA, FAILURES_SCHEMA
from krea_dagster.spend.tables.entries import ENTRIES_NAME, ENTRIES_SCHEMA
from krea_dagster.spend.tables.ledger import LEDGER_SCHEMA
from krea_dagster.spend.tables.measures import ENTRY_SUMS, selected
from krea_dagster.spend.tables.sql import DuckDB, Parts, at_purchase, quoted, text_literal, units_of
from krea_dagster.spend.tables.views import PARTITION, PARTITION_SQL, SpendTables, Table
from krea_dagster.spend.text import unique_names

#: Columns to sum by that are computed, in addition to those of the ledger and the prompt table.
MADE: Final = {
    PARTITION: PARTITION_SQL,
    "week": "strftime(day, '%G-W%V')",
    "month": "strftime(day, '%Y-%m')",
    "year": "strftime(day, '%Y')",
}

#: In front of the name of a column of the prompt table that the ledger has under the same name.
OF_PROMPTS: Final = "prompt_"


@dataclass(frozen=True)
class SpendLine:
    """One line of sums: the values that they are grouped by, and measures, with money in units.

    The measures are those of ``measures.py``; ``open_units`` are its ``credits_unknown``.
    ``by_price`` are the units charged and refunded at each price of a credit.
    """

    of: tuple[str | None, ...] = ()
    purchases: int = 0
    delivered: int = 0
    replaced: int = 0
    accepted: int = 0
    failed: int = 0
    refused: int = 0
    lost: int = 0
    rejected: int = 0
    unknown: int = 0
    pending: int = 0
    reused: int = 0
    charged_units: int = 0
    refunded_units: int = 0
    net_units: int = 0
    returned_units: int = 0
    open_units: int = 0
    at_stake_units: int = 0
    committed_units: int = 0
    saved_units: int = 0
    by_price: tuple[tuple[str, int, int], ...] = field(default=(), kw_only=True)

    def costs(self, *, net: bool = False) -> dict[str, Fraction]:
        """Return the charge in each currency, exactly; with ``net`` without what was refunded."""
        found: dict[str, Fraction] = {}
        for text, charged, refunded in self.by_price:
            price = CreditPrice.parse(text)
            cost = price.cost(charged - (refunded if net else 0))
            found[price.currency] = found.get(price.currency, Fraction(0)) + cost
        return found

    @property
    def each_units(self) -> float | None:
        """All that was charged, per delivered image."""
        return self.charged_units / self.delivered if self.delivered else None

    @property
    def per_accepted_units(self) -> float | None:
        """All that was charged, also for rejected images, per accepted image."""
        return self.charged_units / self.accepted if self.accepted else None

    def plus(self, other: SpendLine) -> Self:
        """Return the sums of both, under the values of this one."""
        return replace(
            self,
            by_price=(*self.by_price, *other.by_price),
            **{name: getattr(self, name) + getattr(other, name) for name in FIGURES},
        )


#: The names of the measures of a line, in their order, and the measures.
FIGURES: Final = tuple(one.name for one in fields(SpendLine))[1:-1]
_MEASURES: Final = {"open_units": "credits_unknown", "saved_units": "credits_saved_by_reuse"}
_NAMES: Final = tuple(
    _MEASURES.get(name, f"credits_{name[:-6]}" if name.endswith("_units") else name)
    for name in FIGURES
)
_SUMS: Final = selected(_NAMES)


def stored_tables(storage: Storage, *, manifest: bool = True) -> SpendTables:
    """Open the spend tables and the manifests, empty ones without files. Raises OSError."""
    read = partial(stored_table, storage)
    return SpendTables(
        read("spend/ledger", LEDGER_SCHEMA),
        read("spend/daily", DAILY_SCHEMA),
        read("spend/failures", FAILURES_SCHEMA),
        read("manifest", MANIFEST_SCHEMA) if manifest else MANIFEST_SCHEMA.empty_table(),
        entries=_stored_entries(storage),
    )


def _stored_entries(storage: Storage) -> pa.Table:
    try:
        with storage.open(ENTRIES_NAME) as file:
            return open_parquet(file).read()
    except FileNotFoundError:
        return ENTRIES_SCHEMA.empty_table()


def open_tables(
    storage: Storage,
    prompts: str | None = None,
    prompts_options: Options | None = None,
    *,
    manifest: bool = True,
    zone: str = "UTC",
    accounts: Sequence[AccountHistory] = (),
) -> DuckDB:
    """Open a DuckDB with the views of ``views.py``.

    ``prompts`` is the source of the prompt table, opened with ``prompts_options``; ``balance`` is
    made of ``accounts``. Without ``manifest`` its files are not opened. Nothing else can be read,
    and nothing written. Raises ConfigError.
    """
    further: dict[str, Table] = {}
    if prompts is not None:
        further["prompts"] = _prompts(prompts, prompts_options)
    tables = replace(stored_tables(storage, manifest=manifest), balance=balance_table(accounts))
    duck = tables.open(zone=zone, **further)
    if manifest:
        create_attribution_view(duck)
    return duck


def run_query(duck: DuckDB, query: str) -> pa.Table:
    """Return the result of one SELECT, with unique names. Raises ConfigError for anything else."""
    try:
        statements = duck.extract_statements(query)
        if len(statements) != 1:
            raise ConfigError(f"the query has {len(statements)} statements; give one")
        if statements[0].type != duckdb.StatementType.SELECT:
            raise ConfigError("only SELECT is allowed; the tables are made from the journal")
        found = duck.sql(query).to_arrow_table()
        return found.rename_columns(unique_names(found.column_names))
    except (duckdb.Error, pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"the query failed: {error}") from error


def sums(
    duck: DuckDB,
    by: Sequence[str] = (),
    *,
    since: date | None = None,
    until: date | None = None,
    where: str = "true",
    most: int | None = None,
) -> list[SpendLine]:
    """Return sums grouped by some columns, in their order; one line without columns.

    ``since`` and ``until`` are days, both included. ``where`` is a condition in SQL. With ``most``
    only the lines with the highest commitment, the highest first. Raises ConfigError.
    """
    source, names = _grouping(duck, by)
    keys = "".join(f"CAST({name} AS VARCHAR) AS key_{at}, " for at, name in enumerate(names))
    order = ", ".join(f"key_{at}" for at in range(len(by)))
    grouped = f"GROUP BY {order} ORDER BY {order}" if by else ""
    if by and most is not None:
        grouped = f"GROUP BY {order} ORDER BY credits_committed DESC, {order} LIMIT {most}"
    low, high = since or date(1970, 1, 1), until or date(9999, 12, 31)
    prices = duck.sql("SELECT DISTINCT credit_price FROM charges ORDER BY ALL").fetchall()
    texts = [text for (text,) in prices if text is not None]
    # One price, as there mostly is, needs no sums of its own.
    at_prices = "".join(
        f", sum({name}) FILTER (credit_price = {text_literal(text)})"
        for text in texts[: 0 if len(texts) == 1 else None]
        for name in ("credits_charged", "credits_refunded")
    )
    found = duck.execute(
        f"SELECT {keys}{_SUMS}{at_prices} FROM {source} "
        f"WHERE day BETWEEN ? AND ? AND ({where}) {grouped}",
        [low, high],
    ).fetchall()
    return [_line(row, len(by), texts) for row in found]


@dataclass(frozen=True)
class EntrySums:
    """The sums of the account's entries of a period in units, and what top-ups cost by currency.

    ``alone_units`` are the refunds and corrections that name no purchase.
    """

    bought_units: int = 0
    given_units: int = 0
    refunded_units: int = 0
    alone_units: int = 0
    paid_units: Mapping[str, int] = field(default_factory=dict)


def entry_sums(duck: DuckDB, since: date | None = None, until: date | None = None) -> EntrySums:
    """Return the sums of the account's entries from one day to another, both included."""
    where = "FROM entries WHERE day BETWEEN ? AND ?"
    days = [since or date(1970, 1, 1), until or date(9999, 12, 31)]
    row = duck.execute(f"SELECT {', '.join(ENTRY_SUMS.values())} {where}", days).fetchone()
    paid = duck.execute(
        f"SELECT currency, sum(paid) {where} AND paid IS NOT NULL GROUP BY ALL ORDER BY ALL", days
    ).fetchall()
    bought, given, refunded, alone = map(units_of, row or ())
    paid_units = {name: units_of(total) for name, total in paid}
    return EntrySums(bought, given, refunded, alone, paid_units)


def _line(row: Sequence[Any], keys: int, prices: Sequence[str]) -> SpendLine:
    end = keys + len(FIGURES)
    figures = [
        units_of(value) if name.endswith("_units") else int(value)
        for name, value in zip(FIGURES, row[keys:end], strict=True)
    ]
    by_price = [(text, figures[_CHARGED_AT], figures[_REFUNDED_AT]) for text in prices]
    if len(prices) > 1:
        pairs = zip(prices, row[end::2], row[end + 1 :: 2], strict=True)
        by_price = [
            (text, units_of(charged), units_of(refunded))
            for text, charged, refunded in pairs
            if charged is not None or refunded is not None
        ]
    return SpendLine(tuple(row[:keys]), *figures, by_price=tuple(by_price))


_CHARGED_AT: Final = FIGURES.index("charged_units")
_REFUNDED_AT: Final = FIGURES.index("refunded_units")


def _grouping(duck: DuckDB, by: Sequence[str]) -> tuple[str, list[str]]:
    """Return the source of sums by these columns, and each column as an expression."""
    ledger = _columns(duck, "ledger")
    if not set(by) - MADE.keys() - set(ledger):
        return "charges", [MADE.get(name) or quoted(name) for name in by]
    recorded, today = recorded_columns(duck), _columns(duck, "manifest")
    of_table = columns_of_table(recorded, today, ledger)
    names, further = [], set()
    for name in by:
        if name in MADE or name in ledger:
            names.append(MADE.get(name) or quoted(name))
            continue
        if name not in of_table:
            raise ConfigError(
                f"cannot sum by {name!r}: no such column; there are "
                f"{', '.join([*MADE, *ledger, *of_table])}"
            )
        column = of_table[name]
        now = f"today.{quoted(column)}" if column in today else "NULL"
        further |= {column} & {*today}
        has, then = at_purchase(column)
        names.append(f"if({has}, {then}, {now})" if column in recorded else now)
    return _with_today(sorted(further), "charges") if further else "charges", names


def columns_of_table(
    recorded: Iterable[str], today: Iterable[str], ledger: Iterable[str]
) -> dict[str, str]:
    """Return the columns of the prompt tables by the names under which they are summed.

    ``recorded`` are those that purchases were written with, ``today`` those of the manifests. A
    name is the column's own, or starts with ``prompt_`` where the ledger, or a computed column, has
    the same.
    """
    taken = {*MADE, *ledger}
    requested = [name for name in MANIFEST_SCHEMA.names if name not in taken]
    found = dict.fromkeys(
        [*recorded, *(name for name in today if name not in MANIFEST_SCHEMA.names)]
    )
    prefixed = {f"{OF_PROMPTS}{name}": name for name in found if name in taken}
    own = {name: name for name in found if name not in taken}
    return {**{name: name for name in requested}, **prefixed, **own}


def recorded_columns(duck: DuckDB) -> list[str]:
    """Return the columns whose values some purchase was written with."""
    found = duck.sql(
        "SELECT DISTINCT unnest(json_keys(attributes)) AS name FROM ("
        "SELECT DISTINCT attributes FROM ledger WHERE attributes IS NOT NULL) ORDER BY name"
    )
    return [row[0] for row in found.fetchall()]


def from_today(duck: DuckDB, by: Sequence[str]) -> dict[str, int]:
    """Return for each column of the prompt table how many purchases were not written with it.

    These are summed by the table as it is today.
    """
    ledger = _columns(duck, "ledger")
    of_table = columns_of_table(recorded_columns(duck), _columns(duck, "manifest"), ledger)
    found = {}
    for name in by:
        if name in of_table and name not in MADE and name not in ledger:
            has, _ = at_purchase(of_table[name])
            ((count,),) = duck.sql(f"SELECT count(*) FROM ledger WHERE NOT {has}").fetchall()
            found[name] = int(count)
    return found


def create_attribution_view(duck: DuckDB) -> None:
    """Create the view ``attribution``: what each purchase was made for, and today's table with it.

    A column that purchases were written with is there as it was then, and as ``today_NAME``.
    """
    today = _columns(duck, "manifest")
    recorded = recorded_columns(duck)
    names = [name for name in recorded if name in today]
    columns = [(name, name) for name in ("idempotency_key", "prompt_id", "sample", "attribution")]
    for name in recorded:
        now = f"today.{quoted(name)}" if name in today else "NULL"
        columns += [(at_purchase(name)[1], name), (now, f"today_{name}")]
    shown = unique_names(name for _, name in columns)
    pairs = zip((sql for sql, _ in columns), shown, strict=True)
    selected_columns = ", ".join(f"{sql} AS {quoted(name)}" for sql, name in pairs)
    source = _with_today(names, "ledger") if names else "ledger"
    duck.execute(f"CREATE VIEW attribution AS SELECT {selected_columns} FROM {source}")


def _with_today(names: Sequence[str], view: str) -> str:
    """Return the view ``ledger`` or ``charges`` with columns of the manifest, as the row ``today``.

    They are those of the row that requests the image: tables that share a journal may have rows of
    the same prompt_id. The manifest does not list earlier attempts; theirs are those of the row.
    """
    packed = ", ".join(f"{quoted(name)} := {quoted(name)}" for name in names)
    return f"""(
        SELECT {view}.*, coalesce(asked.today, named.today) AS today FROM {view}
        LEFT JOIN (
            SELECT request_key, arg_min(struct_pack({packed}), (prompt_id, sample)) AS today
            FROM manifest GROUP BY request_key
        ) AS asked ON asked.request_key = {view}.request_key
        LEFT JOIN (
            SELECT prompt_id, sample, any_value(struct_pack({packed})) AS today
            FROM manifest GROUP BY prompt_id, sample
        ) AS named ON named.prompt_id = {view}.prompt_id AND named.sample = {view}.sample
    )"""


def _columns(duck: DuckDB, view: str) -> list[str]:
    return list(duck.sql(f"SELECT * FROM {quoted(view)} LIMIT 0").columns)


def _prompts(source: str, options: Options | None) -> Table:
    try:
        paths = _prompt_files(source, options)
        schema = pa.schema([] if paths else [("prompt", pa.string())])
        return dataset_of(paths, schema, options)
    except KreaError:
        raise
    except Exception as error:  # noqa: BLE001 - Arrow and file systems raise errors of any type
        text = redact.text(str(error), source)
        raise ConfigError(
            f"the prompt table {redact.location(source)} cannot be read: {text}"
        ) from redact.safe_cause(error, source)


def _prompt_files(source: str, options: Options | None) -> list[str]:
    fs, path = open_url(source, options)
    if fs.isdir(path):
        found = [name for name in fs.find(path) if name.endswith(".parquet")]
        return [str(fs.unstrip_protocol(name)) for name in sorted(found)]
    return [source] if fs.exists(path) else []


def prompt_texts(storage: Storage, prompt_ids: Sequence[str]) -> Mapping[str, str]:
    """Read the prompts of a few prompt_ids from the manifests. Raises OSError."""
    names = present_manifests(storage)
    if not names or not prompt_ids:
        return {}
    found = [open_for_arrow(storage.locate(name), storage.options) for name in names]
    schema = pa.schema([("prompt_id", pa.string()), ("prompt", pa.string())])
    paths = [path for _, path in found]
    manifests = ds.dataset(paths, schema=schema, format="parquet", filesystem=found[0][0])
    wanted = pc.field("prompt_id").isin(list(prompt_ids))
    rows = manifests.to_table(filter=wanted).to_pydict()
    return dict(zip(rows["prompt_id"], rows["prompt"], strict=True))


def stored_table(storage: Storage, folder: str, schema: pa.Schema) -> Table:
    """Open the Parquet files of a folder as one table; an empty one where there are none."""
    names = sorted(name for name in storage.names(folder) if name.endswith(".parquet"))
    return dataset_of(map(storage.locate, names), schema, storage.options)


def dataset_of(
    locations: Iterable[str], schema: pa.Schema, options: Options | None = None
) -> Table:
    """Open Parquet files as one table with the columns of ``schema`` and of all files.

    Rows are read when they are used. Files whose columns have types without a common one are parts
    of their own, and those columns are read as text.
    """
    groups: list[tuple[pa.Schema, list[str]]] = []
    as_text: set[str] = set()
    fs: Any = None
    for location in locations:
        fs, path = open_for_arrow(location, options)
        own = pq.read_schema(path, filesystem=fs).remove_metadata()
        for number, (together, paths) in enumerate(groups):
            if (both := _unified(together, own)) is not None:
                groups[number] = (both, [*paths, path])
                break
        else:
            as_text |= {name for other, _ in groups for name in _differing(other, own)}
            groups.append((_unified(schema, own) or own, [path]))
    if not groups:
        return schema.empty_table()
    tables = [
        ds.dataset(paths, schema=one, format="parquet", filesystem=fs) for one, paths in groups
    ]
    return tables[0] if len(tables) == 1 else Parts(tables, frozenset(as_text))


def _unified(left: pa.Schema, right: pa.Schema) -> pa.Schema | None:
    try:
        return pa.unify_schemas([left, right], promote_options="permissive")
    except pa.ArrowTypeError:
        return None


def _differing(left: pa.Schema, right: pa.Schema) -> list[str]:
    """Return the columns whose types have no common one."""
    both = [name for name in left.names if name in right.names]
    return [
        name
        for name in both
        if _unified(pa.schema([left.field(name)]), pa.schema([right.field(name)])) is None
    ]
