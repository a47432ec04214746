"""Whether every row of a run has its image: the check of `images`, made from the run itself."""

from collections import Counter

import dagster as dg

from krea_dagster.engine.runner import RunReport
from krea_dagster.plugin.figures import Figures
from krea_dagster.plugin.metadata import missing_table

CHECK_NAME = "all_rows_delivered"


def check_rows(figures: Figures, report: RunReport) -> dg.AssetCheckResult:
    """Whether every row of a run has its image; names those that have not, and why."""
    missing = figures.missing_count
    if missing == 0:
        return dg.AssetCheckResult(
            passed=True,
            check_name=CHECK_NAME,
            metadata={"rows": figures.rows},
            description=f"All {figures.rows} rows have their image.",
        )
    reasons = figures.reasons
    listed = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
    left = Counter(report.left.values()).most_common(10)
    return dg.AssetCheckResult(
        passed=False,
        check_name=CHECK_NAME,
        severity=dg.AssetCheckSeverity.ERROR,
        description=f"{missing} of {figures.rows} rows have no image: {listed}",
        metadata={
            "rows": figures.rows,
            "rows_missing": missing,
            "missing": missing_table(figures),
            **({"left_for_later": dict(left)} if left else {}),
            **({"caps_reached": list(report.caps_reached)} if report.caps_reached else {}),
        },
    )
