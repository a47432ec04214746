"""The check of ``images``, made by the run itself: every row has its image."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from krea_dagster.application.manifest_summary import ManifestSummary
from krea_dagster.engine.run.report import RunReport
from krea_dagster.plugin.metadata import missing_table
from krea_dagster.prompts.trial import TrialRows

CHECK_NAME = "all_rows_delivered"


def check_rows(
    figures: ManifestSummary,
    report: RunReport,
    held: int = 0,
    *,
    trial: TrialRows | None = None,
    notes: Sequence[str] = (),
) -> dg.AssetCheckResult:
    """Check that every row of a run has its image; name the missing rows, and why.

    In a run that did not wait, rows that are under way are a warning instead of an error, and so
    are rows that a ``trial`` leaves out. Rows that are ``held`` back, because enough are accepted
    or a candidate budget is spent, are not missing. The ``notes`` on the table are metadata.
    """
    missing = figures.missing_count - held
    metadata: dict[str, Any] = {
        "rows": figures.rows,
        **({"trial": str(trial), "rows_outside_trial": figures.outside.total()} if trial else {}),
        **({"rows_held_back": held} if held else {}),
        **(
            {"notes": dg.MetadataValue.md("\n".join(f"- {note}" for note in notes))}
            if notes
            else {}
        ),
        **_missed_callbacks(report),
    }
    if missing <= 0:
        return _delivered(figures, held, trial, metadata)
    reasons = figures.reasons
    listed = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
    left = Counter(report.left_reasons).most_common(10)
    later = not report.waited and missing == figures.under_way
    when = " yet; a later run collects them" if later else ""
    what = f"{missing} of {figures.rows} rows have no image{when}"
    if trial is not None:
        what = f"A trial: {trial}, of which {missing} images are missing{when}"
    return dg.AssetCheckResult(
        passed=False,
        check_name=CHECK_NAME,
        severity=dg.AssetCheckSeverity.WARN if later else dg.AssetCheckSeverity.ERROR,
        description=f"{what}: {listed}",
        metadata={
            **metadata,
            "rows_missing": missing,
            "missing": missing_table(figures),
            **({"left_for_later": dict(left)} if left else {}),
            **({"caps_reached": list(report.caps_reached)} if report.caps_reached else {}),
        },
    )


def _delivered(
    figures: ManifestSummary, held: int, trial: TrialRows | None, metadata: Mapping[str, Any]
) -> dg.AssetCheckResult:
    """Return the result of a run that bought what it should."""
    left_out = figures.outside.total()
    description = f"All {figures.rows} rows have their image"
    if trial is not None:
        description = f"A trial: {trial}, and each has its image"
    if held:
        description += (
            f", except {held} that are held back: enough are accepted, or the candidate budget is "
            "spent"
        )
    if left_out:
        description += (
            f". {left_out:,} images of the other rows are not bought; a run without limit and "
            "sample buys them"
        )
    return dg.AssetCheckResult(
        passed=not left_out,
        check_name=CHECK_NAME,
        severity=dg.AssetCheckSeverity.WARN if left_out else dg.AssetCheckSeverity.ERROR,
        description=f"{description}.",
        metadata=metadata,
    )


def _missed_callbacks(report: RunReport) -> dict[str, int]:
    return {"missed_callbacks": report.missed_callbacks} if report.missed_callbacks else {}
