"""The check of the share of failed rows: a few are a warning, many an error."""

from collections import Counter
from collections.abc import Mapping
from typing import Final

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.application.manifest_summary import FAILED_STATES
from krea_dagster.errors import ConfigError
from krea_dagster.plugin.checks.findings import RowFindings
from krea_dagster.plugin.checks.manifest_check import (
    CheckedManifests,
    common_metadata,
    manifest_check,
)

#: Without deferred rows and tasks under way, which ``all_rows_delivered`` counts.
_FAILED: Final = pa.array([state.value for state in FAILED_STATES])


def build_failure_share_check(
    manifest_key: dg.AssetKey,
    *,
    resource_key: str = "krea",
    warn_above: float = 0.01,
    error_above: float = 0.05,
) -> dg.AssetChecksDefinition:
    """Build the check ``failure_share``: the share of rows that failed.

    These are failed, refused and lost rows, and rows with an unknown outcome.

    Args:
        manifest_key: Key of the manifest's asset.
        resource_key: Key of the ``KreaResource``.
        warn_above: Share, from 0 to 1, above which the check warns.
        error_above: Share above which it is an error.

    Returns:
        The check.

    Raises:
        ConfigError: for shares out of range or order.

    Example::

        build_krea_definitions(
            ..., checks=[functools.partial(build_failure_share_check, error_above=0.1)]
        )
    """
    if not 0 <= warn_above <= error_above <= 1:
        raise ConfigError(
            f"warn_above {warn_above:g} and error_above {error_above:g} must be shares from 0 to "
            "1, the second not below the first"
        )

    def check(manifests: CheckedManifests) -> dg.AssetCheckResult:
        findings, rows, reasons = RowFindings(), 0, Counter[str]()
        for batch in manifests.batches(["status", "error_code", "error_message"]):
            rows += batch.num_rows
            failed = pc.is_in(batch.column("status"), value_set=_FAILED)
            if findings.add(batch, failed, _why):
                found = batch.filter(failed)
                codes = found.column("error_code").fill_null("")
                said = pc.binary_join_element_wise(found.column("status"), codes, " ")
                reasons.update(
                    {one["values"].as_py().strip(): one["counts"].as_py() for one in _counts(said)}
                )
        share = findings.count / rows if rows else 0.0
        listed = "; ".join(f"{count} × {reason[:80]}" for reason, count in reasons.most_common(10))
        above = error_above if share > error_above else warn_above
        description = f"{findings.count} of {rows} rows failed ({share:.2%})" + (
            f", above {above:.2%}: {listed}" if share > warn_above else ""
        )
        return dg.AssetCheckResult(
            passed=share <= warn_above,
            severity=_severity(share, error_above),
            description=description,
            metadata={
                **common_metadata(manifests, rows),
                "failure_share": share,
                **findings.metadata(),
            },
        )

    return manifest_check(
        manifest_key,
        resource_key,
        name="failure_share",
        description=(
            f"At most {warn_above:.2%} of the rows failed; above {error_above:.2%} is an error."
        ),
        check=check,
    )


def _severity(share: float, error_above: float) -> dg.AssetCheckSeverity:
    return dg.AssetCheckSeverity.ERROR if share > error_above else dg.AssetCheckSeverity.WARN


def _counts(texts: pa.Array) -> pa.Array:
    return pc.value_counts(texts)


def _why(row: Mapping[str, object]) -> str:
    said = [row["status"], row["error_code"], row["error_message"]]
    return ": ".join(str(text) for text in said if text)
