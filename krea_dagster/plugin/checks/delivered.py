"""The check of ``images``, made by the run itself: every row has its image."""

from collections import Counter

import dagster as dg

from krea_dagster.application.manifest_summary import ManifestSummary
from krea_dagster.engine.run.report import RunReport
from krea_dagster.plugin.metadata import missing_table

CHECK_NAME = "all_rows_delivered"


def check_rows(figures: ManifestSummary, report: RunReport, held: int = 0) -> dg.AssetCheckResult:
    """Check that every row of a run has its image; name the missing rows, and why.

    In a run that did not wait, rows that are under way are a warning instead of an error. Rows that
    are ``held`` back, because enough are accepted or a candidate budget is spent, are not missing.
    """
    missing = figures.missing_count - held
    if missing <= 0:
        return dg.AssetCheckResult(
            passed=True,
            check_name=CHECK_NAME,
            metadata={
                "rows": figures.rows,
                **({"rows_held_back": held} if held else {}),
                **_missed_callbacks(report),
            },
            description=(
                f"All {figures.rows} rows have their image."
                if not held
                else f"All {figures.rows} rows have their image, except {held} that are held back: "
                "enough are accepted, or the candidate budget is spent."
            ),
        )
    reasons = figures.reasons
    listed = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
    left = Counter(report.left_reasons).most_common(10)
    later = not report.waited and missing == figures.under_way
    when = " yet; a later run collects them" if later else ""
    return dg.AssetCheckResult(
        passed=False,
        check_name=CHECK_NAME,
        severity=dg.AssetCheckSeverity.WARN if later else dg.AssetCheckSeverity.ERROR,
        description=f"{missing} of {figures.rows} rows have no image{when}: {listed}",
        metadata={
            "rows": figures.rows,
            "rows_missing": missing,
            **({"rows_held_back": held} if held else {}),
            "missing": missing_table(figures),
            **({"left_for_later": dict(left)} if left else {}),
            **({"caps_reached": list(report.caps_reached)} if report.caps_reached else {}),
            **_missed_callbacks(report),
        },
    )


def _missed_callbacks(report: RunReport) -> dict[str, int]:
    return {"missed_callbacks": report.missed_callbacks} if report.missed_callbacks else {}
