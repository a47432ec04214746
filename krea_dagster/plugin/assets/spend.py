"""The assets ``spend_ledger`` and ``spend_daily``, and the job ``krea_spend`` that updates them."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from datetime import datetime, timedelta, timezone
from typing import Any, Final

import dagster as dg
import pyarrow as pa
from pydantic import Field

from krea_dagster.application.spend import update_tables
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError
from krea_dagster.models import credits_from_units
from krea_dagster.plugin.checks.spend_proof import build_spend_proof_check
from krea_dagster.plugin.checks.spend_warnings import build_spend_warnings_checks
from krea_dagster.plugin.failures import as_failure
from krea_dagster.plugin.metadata import krea_entry, krea_metadata, location_value, table_schema
from krea_dagster.plugin.names import Names
from krea_dagster.plugin.progress import step_log
from krea_dagster.plugin.resource import krea_of
from krea_dagster.spend.tables.daily import DAILY_DESCRIPTIONS, daily_schema
from krea_dagster.spend.tables.ledger import LEDGER_DESCRIPTIONS, LEDGER_SCHEMA
from krea_dagster.spend.tables.query import open_tables, sums

#: A ledger that was made before this time may be of definitions that no longer exist.
_LATELY: Final = timedelta(days=7)


class KreaSpendConfig(dg.Config):
    """Options of one run of the spend tables."""

    rebuild: bool = Field(
        default=False, description="Rebuild the tables of all months, not only what has changed."
    )


def build_spend(
    names: Names,
    manifests: Sequence[dg.AssetKey],
    *,
    by: Sequence[str] = (),
    budgets: Sequence[str] = (),
    schedule: str | None = None,
    zone: str = "UTC",
) -> dg.Definitions:
    """Build ``spend_ledger`` and ``spend_daily`` with their checks and jobs.

    Both are made from the journal and the ``manifests``, without network, a month at a time: new
    purchases, and those that have settled since. ``by`` are further columns of the prompt table
    that the daily sums are grouped by; ``budgets`` are soft ones; ``schedule`` is a cron expression
    in the time zone ``zone``. Raises ConfigError for a column that the daily sums already have, a
    malformed budget, or an impossible schedule.
    """
    ledger_key, daily_key = names.key("spend_ledger"), names.key("spend_daily")

    @dg.multi_asset(
        name=names.prefixed("krea_spend_tables"),
        specs=_table_specs(names, manifests, daily_schema(by)),
        required_resource_keys={names.resource_key},
    )
    def spend_tables(
        context: dg.AssetExecutionContext, config: KreaSpendConfig
    ) -> Iterator[dg.MaterializeResult[None]]:
        from krea_dagster.spend.report.sparkline import days_of, spend_sparkline

        krea = krea_of(context, names.resource_key)
        with step_log(context.log, "reading the journal"), as_failure():
            updated = update_tables(krea, by=by, rebuild=config.rebuild)
            storage = krea.open_storage()
            figures = spend_metadata(storage, datetime.now(timezone.utc))
            with closing(open_tables(storage, manifest=False)) as duck:
                ((daily_rows,),) = duck.execute("SELECT count(*) FROM daily").fetchall()
                sparkline = base64.b64encode(spend_sparkline(days_of(duck))).decode()
        others = _same_purchases(context, ledger_key, storage.locate("spend/ledger"))
        plot = dg.MetadataValue.md(f"![credits by day](data:image/svg+xml;base64,{sparkline})")
        own: dict[str, Mapping[str, Any]] = {
            "ledger": {"dagster/row_count": figures["purchases"]},
            "daily": {"spend": plot, "dagster/row_count": daily_rows},
        }
        for key, table in ((ledger_key, "ledger"), (daily_key, "daily")):
            yield dg.MaterializeResult(
                asset_key=key,
                metadata=krea_metadata(
                    {
                        **own[table],
                        **figures,
                        **(others if key == ledger_key else {}),
                        "months_written": len(updated.months),
                        "path": location_value(storage.locate(f"spend/{table}")),
                    }
                ),
            )

    proof = build_spend_proof_check(names)
    job = dg.define_asset_job(
        names.prefixed("krea_spend"),
        # Without the proof, which reads every file again.
        selection=dg.AssetSelection.assets(spend_tables) - dg.AssetSelection.checks(proof),
        description="Updates the spend tables from the journal; buys nothing.",
    )
    proof_job = dg.define_asset_job(
        names.prefixed("krea_proof"),
        selection=dg.AssetSelection.checks(proof),
        description=(
            "Compares every charge with its task, its file, its manifest row and the account."
        ),
    )
    warnings = build_spend_warnings_checks(
        daily_key, resource_key=names.resource_key, budgets=budgets
    )
    return dg.Definitions(
        assets=[spend_tables],
        asset_checks=[proof, warnings],
        jobs=[job, proof_job],
        schedules=[] if schedule is None else [_schedule(names, job, schedule, zone)],
    )


def _schedule(names: Names, job: Any, cron: str, zone: str) -> dg.ScheduleDefinition:
    """Build the schedule of the job, which is on: it buys nothing. Raises ConfigError."""
    try:
        return dg.ScheduleDefinition(
            name=names.prefixed("krea_spend_schedule"),
            job=job,
            cron_schedule=cron,
            execution_timezone=zone,
            default_status=dg.DefaultScheduleStatus.RUNNING,
            description="Updates the spend tables, and checks them for warnings.",
        )
    except dg.DagsterInvalidDefinitionError as error:
        raise ConfigError(f"spend_schedule cannot be used: {error}") from error


def _table_specs(
    names: Names, manifests: Sequence[dg.AssetKey], schema: pa.Schema
) -> list[dg.AssetSpec]:
    ledger_key, daily_key = names.key("spend_ledger"), names.key("spend_daily")
    common: dict[str, Any] = {"group_name": names.group_name, "kinds": {"parquet", "duckdb"}}
    return [
        dg.AssetSpec(
            ledger_key,
            deps=manifests,
            description="One row per purchase: time, request, cost, and outcome.",
            metadata={"dagster/column_schema": table_schema(LEDGER_SCHEMA, LEDGER_DESCRIPTIONS)},
            **common,
        ),
        dg.AssetSpec(
            daily_key,
            deps=[ledger_key],
            description="Sums by day, partition, table, quality and size, and the cost per image.",
            metadata={"dagster/column_schema": table_schema(schema, DAILY_DESCRIPTIONS)},
            **common,
        ),
    ]


def _same_purchases(
    context: dg.AssetExecutionContext, key: dg.AssetKey, path: str
) -> Mapping[str, str]:
    """Name the other ledgers that Dagster has lately made of the same journal.

    Each contains the purchases of all prompt tables, so that their sum would be too high.
    """
    since_s = (datetime.now(timezone.utc) - _LATELY).timestamp()
    same = []
    for other in sorted(context.instance.all_asset_keys()):
        if other.path[-1] == key.path[-1] and other != key:
            event = context.instance.get_latest_materialization_event(other)
            made = None if event is None else event.asset_materialization
            if event is None or made is None or event.timestamp < since_s:
                continue
            if krea_entry(made.metadata, "path") == location_value(path):
                same.append(other.to_user_string())
    if not same:
        return {}
    context.log.warning(
        "%s has the same purchases as %s: do not add them up. Give spend=False to all prompt "
        "tables of a journal but one, or use build_krea_tables.",
        key.to_user_string(),
        ", ".join(same),
    )
    return {"same_purchases_as": ", ".join(same)}


def spend_metadata(storage: Storage, now: datetime) -> Mapping[str, Any]:
    """Return figures that Dagster plots: credits today, this month, in total, and at stake."""
    today = now.astimezone(timezone.utc).date()
    with closing(open_tables(storage, manifest=False)) as duck:
        (total,) = sums(duck)
        (month,) = sums(duck, since=today.replace(day=1), until=today)
        (day,) = sums(duck, since=today, until=today)
    return {
        "purchases": total.purchases,
        "purchases_today": day.purchases,
        "credits_today": credits_from_units(day.charged_units),
        "credits_this_month": credits_from_units(month.charged_units),
        "credits_charged": credits_from_units(total.charged_units),
        "credits_refunded": credits_from_units(total.refunded_units),
        "credits_net": credits_from_units(total.net_units),
        "credits_at_stake": credits_from_units(total.at_stake_units),
        "unknown": total.unknown,
        "lost": total.lost + total.rejected,
    }
