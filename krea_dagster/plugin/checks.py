"""The asset checks."""

from collections import Counter

import dagster as dg
import pyarrow as pa

from krea_dagster.engine.runner import RunReport
from krea_dagster.plugin.metadata import missing_rows, missing_table

CHECK_NAME = "all_rows_delivered"


def check_rows(manifest: pa.Table, report: RunReport) -> dg.AssetCheckResult:
    """Whether every row of a run has its image; names those that have not, and why."""
    missing = missing_rows(manifest)
    if missing.num_rows == 0:
        return dg.AssetCheckResult(
            passed=True,
            check_name=CHECK_NAME,
            metadata={"rows": manifest.num_rows},
            description=f"All {manifest.num_rows} rows have their image.",
        )
    reasons = Counter(
        f"{status}: {code or 'no code'}"
        for status, code in zip(
            missing["status"].to_pylist(), missing["error_code"].to_pylist(), strict=True
        )
    )
    listed = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
    left = Counter(report.left.values()).most_common(10)
    return dg.AssetCheckResult(
        passed=False,
        check_name=CHECK_NAME,
        severity=dg.AssetCheckSeverity.ERROR,
        description=f"{missing.num_rows} of {manifest.num_rows} rows have no image: {listed}",
        metadata={
            "rows": manifest.num_rows,
            "rows_missing": missing.num_rows,
            "missing": missing_table(manifest),
            **({"left_for_later": dict(left)} if left else {}),
            **({"caps_reached": list(report.caps_reached)} if report.caps_reached else {}),
        },
    )
