"""The check of how many rows failed: a few are a warning, many an error."""

from collections import Counter
from collections.abc import Mapping
from typing import Final

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.application.manifest_summary import FAILED_STATES
from krea_dagster.errors import ConfigError
from krea_dagster.plugin.checks.findings import Findings
from krea_dagster.plugin.checks.manifest_check import Subject, common_metadata, manifest_check

#: Deferred rows and tasks under way are not among them: ``all_rows_delivered`` counts those.
_FAILED: Final = pa.array([state.value for state in FAILED_STATES])


def build_failure_share_check(
    manifest_key: dg.AssetKey,
    *,
    resource_key: str = "krea",
    warn_above: float = 0.01,
    error_above: float = 0.05,
) -> dg.AssetChecksDefinition:
    """Build the check ``failure_share`` of the rows that failed.

    Failed, refused, lost, or of unknown outcome; as a share (0 to 1) of all rows that the check
    looks at. It warns above one share and is an error above the other. Raises ConfigError for
    shares that cannot be.
    """
    if not 0 <= warn_above <= error_above <= 1:
        raise ConfigError(
            f"warn_above {warn_above:g} and error_above {error_above:g} must be shares from 0 to "
            "1, the second not below the first"
        )

    def look(subject: Subject) -> dg.AssetCheckResult:
        findings, rows, reasons = Findings(), 0, Counter[str]()
        for batch in subject.batches(["status", "error_code", "error_message"]):
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
                **common_metadata(subject, rows),
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
        look=look,
    )


def _severity(share: float, error_above: float) -> dg.AssetCheckSeverity:
    return dg.AssetCheckSeverity.ERROR if share > error_above else dg.AssetCheckSeverity.WARN


def _counts(texts: pa.Array) -> pa.Array:
    return pc.value_counts(texts)


def _why(row: Mapping[str, object]) -> str:
    said = [row["status"], row["error_code"], row["error_message"]]
    return ": ".join(str(text) for text in said if text)
