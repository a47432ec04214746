"""The asset checks of ``spend_daily``, one for each kind of warning in the spend tables."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, Final

import dagster as dg

from krea_dagster.application.spend_warnings import recent_warnings
from krea_dagster.engine.budget import Budget
from krea_dagster.models import credits_from_units
from krea_dagster.plugin.failures import as_failure
from krea_dagster.plugin.metadata import small_table
from krea_dagster.plugin.resource import krea_of
from krea_dagster.spend.warnings.spend_warning import SpendWarning, WarningKind

#: What each check verifies, by its kind; the check's name is ``spend_`` and the kind.
_DESCRIPTIONS: Final[Mapping[WarningKind, str]] = {
    WarningKind.ACCOUNT_DIFFERS: "The journal explains what the account used.",
    WarningKind.BUDGET_USED: (
        "No budget is nearly used up, and the month's is not used faster than the month passes."
    ),
    WarningKind.FORECAST: "The month will end within its budget, judging by the last twelve weeks.",
    WarningKind.CREDITS_RUN_OUT: (
        "The account's credits last for balance_days, judging by the last twelve weeks."
    ),
    WarningKind.DAY_OUT_OF_HABIT: (
        "No day cost far more than its weekday usually does, and more than each day of half a year."
    ),
    WarningKind.PARTITION_OUT_OF_HABIT: "No partition cost far more than usual.",
    WarningKind.STOPPED: "Purchases have not stopped, if there are some on most days.",
    WarningKind.LEVEL_CHANGED: "Two weeks cost about as much as the twelve weeks before.",
    WarningKind.PRICE_CHANGED: "A call costs as much as before.",
    WarningKind.FAILURE_NEW: "No purchase failed with a new kind of error.",
    WarningKind.FAILURES_HIGH: "No day had far more failed purchases than usual.",
}


def build_spend_warnings_checks(
    daily_key: dg.AssetKey,
    *,
    resource_key: str = "krea",
    budgets: Sequence[str] = (),
) -> dg.AssetChecksDefinition:
    """Build the checks of ``spend_daily``, one for each kind of warning.

    They are warnings, except a difference between account and journal, which is an error. All
    budgets of the resource count; ``budgets`` are further soft ones, written as those:
    ``month=900``, ``partition=20``, or ``column:campaign:autumn=100`` for a column of the prompt
    table. A warning fails its check until seven days after its last day, unless a person has
    acknowledged it. Needs no network. Raises ConfigError.
    """
    parsed = [Budget.parse(text) for text in budgets]
    specs = [
        dg.AssetCheckSpec(f"spend_{kind.value}", asset=daily_key, description=text)
        for kind, text in _DESCRIPTIONS.items()
    ]

    @dg.multi_asset_check(
        name="_".join([*daily_key.path, "warnings"]),
        specs=specs,
        can_subset=True,
        required_resource_keys={resource_key},
    )
    def spend_warnings(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        krea = krea_of(context, resource_key)
        now = datetime.now(timezone.utc)
        with as_failure():
            found = recent_warnings(krea, parsed, now=now)
        chosen = {key.name for key in context.selected_asset_check_keys}
        for kind in WarningKind:
            name = f"spend_{kind.value}"
            if name in chosen:
                yield _result(daily_key, name, kind, found)

    return spend_warnings


def _result(
    daily_key: dg.AssetKey, name: str, kind: WarningKind, found: Sequence[SpendWarning] | None
) -> dg.AssetCheckResult:
    error = kind is WarningKind.ACCOUNT_DIFFERS
    severity = dg.AssetCheckSeverity.ERROR if error else dg.AssetCheckSeverity.WARN
    if found is None:
        return dg.AssetCheckResult(
            passed=False,
            asset_key=daily_key,
            check_name=name,
            severity=dg.AssetCheckSeverity.WARN,
            description="Nothing was checked: there are no spend tables yet.",
        )
    every = [one for one in found if one.kind is kind]
    mine = [one for one in every if one.acknowledgement is None]
    more = f" And {len(mine) - 1} more." if len(mine) > 1 else ""
    return dg.AssetCheckResult(
        passed=not mine,
        asset_key=daily_key,
        check_name=name,
        severity=severity,
        description=f"{mine[0].text} {mine[0].advice}{more}" if mine else _DESCRIPTIONS[kind],
        metadata=_metadata(mine, every),
    )


def _metadata(mine: Sequence[SpendWarning], every: Sequence[SpendWarning]) -> Mapping[str, Any]:
    """Return the number and money of the warnings, and a table that has acknowledged ones too."""
    values: dict[str, Any] = {
        "warnings": len(mine),
        "acknowledged": len(every) - len(mine),
        "credits_in_question": credits_from_units(sum(one.units for one in mine)),
    }
    if every:
        values["findings"] = small_table(
            {
                "warning_id": one.warning_id,
                "since": f"{one.since}",
                "until": f"{one.until}",
                "about": one.about,
                "finding": one.text,
                "credits": credits_from_units(one.units),
                "acknowledged": one.acknowledgement.reason if one.acknowledgement else "",
            }
            for one in every
        )
    return values
