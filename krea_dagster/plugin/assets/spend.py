"""The assets spend_ledger and spend_daily, and the job krea_spend that brings them up to date."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Final

import dagster as dg
from pydantic import Field

from krea_dagster.application.spend import update_tables
from krea_dagster.engine.budget import CREDITS_PER_USD
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.models import credits_from_units
from krea_dagster.plugin.failures import as_failure
from krea_dagster.plugin.metadata import location_value, table_schema
from krea_dagster.plugin.resource import krea_of
from krea_dagster.spend.report.sparkline import spend_sparkline
from krea_dagster.spend.tables.daily import DAILY_DESCRIPTIONS, daily_schema
from krea_dagster.spend.tables.ledger import LEDGER_DESCRIPTIONS, LEDGER_SCHEMA
from krea_dagster.spend.tables.query import open_tables, stored_tables, sums

SPEND_JOB_NAME: Final = "krea_spend"


class KreaSpendConfig(dg.Config):
    """What a person may ask of one run."""

    rebuild: bool = Field(
        default=False, description="Make the tables of all months anew, not only what has changed."
    )


@dataclass(frozen=True)
class KreaSpend:
    """The spend assets of one prompt table, and their job."""

    tables: dg.AssetsDefinition
    job: Any


def build_spend_assets(
    manifest_key: dg.AssetKey,
    *,
    prefix: Sequence[str] = (),
    group_name: str = "krea",
    resource_key: str = "krea",
    credits_per_usd: float = CREDITS_PER_USD,
    by: Sequence[str] = (),
) -> KreaSpend:
    """Build ``spend_ledger``, ``spend_daily`` and the job ``krea_spend``.

    Both are made from the journal and the manifests, without network, a month at a time: what is
    new, and what has settled since. ``credits_per_usd`` is the rate of the dollars, and ``by``
    names further columns of the prompt table that the daily sums are kept apart by. Raises
    ConfigError for a column that the daily sums have already.
    """
    schema = daily_schema(by)
    ledger_key, daily_key = (
        dg.AssetKey([*prefix, f"spend_{name}"]) for name in ("ledger", "daily")
    )

    @dg.multi_asset(
        name="_".join([*prefix, "krea_spend_tables"]),
        specs=[
            dg.AssetSpec(
                ledger_key,
                deps=[manifest_key],
                group_name=group_name,
                kinds={"parquet", "duckdb"},
                description="One row per purchase: when, what for, what it cost, what it bought.",
                metadata={
                    "dagster/column_schema": table_schema(LEDGER_SCHEMA, LEDGER_DESCRIPTIONS)
                },
            ),
            dg.AssetSpec(
                daily_key,
                deps=[ledger_key],
                group_name=group_name,
                kinds={"parquet", "duckdb"},
                description="Sums by day, partition, quality and size, and what an image came to.",
                metadata={"dagster/column_schema": table_schema(schema, DAILY_DESCRIPTIONS)},
            ),
        ],
        required_resource_keys={resource_key},
    )
    def spend_tables(
        context: dg.AssetExecutionContext, config: KreaSpendConfig
    ) -> Iterator[dg.MaterializeResult[None]]:
        krea = krea_of(context, resource_key)
        with as_failure():
            updated = update_tables(
                krea, credits_per_usd=credits_per_usd, by=by, rebuild=config.rebuild
            )
            storage = krea.open_storage()
            figures = spend_metadata(storage, datetime.now(timezone.utc))
            tables = stored_tables(storage)
            picture = base64.b64encode(spend_sparkline(tables.daily)).decode()
        own: dict[str, Mapping[str, Any]] = {
            "ledger": {"dagster/row_count": tables.ledger.count_rows()},
            "daily": {
                "dagster/row_count": tables.daily.count_rows(),
                "spend": dg.MetadataValue.md(
                    f"![credits by day](data:image/svg+xml;base64,{picture})"
                ),
            },
        }
        for key, table in ((ledger_key, "ledger"), (daily_key, "daily")):
            yield dg.MaterializeResult(
                asset_key=key,
                metadata={
                    **figures,
                    **own[table],
                    "months_written": len(updated.months),
                    "path": location_value(storage.locate(f"spend/{table}")),
                },
            )

    job = dg.define_asset_job(
        "_".join([*prefix, SPEND_JOB_NAME]),
        selection=dg.AssetSelection.assets(spend_tables),
        description="Brings the tables of what was spent up to the journal; buys nothing.",
    )
    return KreaSpend(spend_tables, job)


def spend_metadata(storage: Storage, now: datetime) -> Mapping[str, Any]:
    """Return figures that Dagster plots: credits today, this month, in all, and at stake."""
    today = now.astimezone(timezone.utc).date()
    duck = open_tables(storage)
    try:
        (total,) = sums(duck)
        (month,) = sums(duck, since=today.replace(day=1), until=today)
        (day,) = sums(duck, since=today, until=today)
    finally:
        duck.close()
    return {
        "purchases": total.purchases,
        "purchases_today": day.purchases,
        "credits_today": credits_from_units(day.charged_units),
        "credits_this_month": credits_from_units(month.charged_units),
        "credits_charged": credits_from_units(total.charged_units),
        "credits_at_stake": credits_from_units(total.at_stake_units),
        "unknown": total.unknown,
        "lost": total.lost + total.rejected,
    }
