"""The check of the share of failed rows."""

from __future__ import annotations

import dagster as dg
import pytest

from krea_dagster.errors import ConfigError
from krea_dagster.plugin.checks import (
    build_failure_share_check,
)
from tests.plugin.checks.stored_manifests import (
    ERROR,
    MANIFEST,
    WARN,
    StoredManifests,
    named,
    number,
)

pytestmark = pytest.mark.filterwarnings("ignore::dagster.BetaWarning")  # backfill_policy is beta


@pytest.mark.parametrize(
    ("failed", "passed", "severity"),
    [(0, True, None), (1, True, None), (2, False, WARN), (6, False, ERROR)],
)
def test_few_failures_pass_more_warn_and_many_are_an_error(
    stored: StoredManifests, failed: int, passed: bool, severity: dg.AssetCheckSeverity | None
) -> None:
    stored.write([*map(stored.failed, range(failed)), *map(stored.row, range(failed, 100))])
    check = stored.check(build_failure_share_check)
    assert check.passed is passed
    assert number(check, "failure_share") == failed / 100
    if severity:
        assert check.severity is severity
        assert f"{failed} × failed content_policy_violation" in (check.description or "")
        assert named(check)["row-0001"] == "failed: content_policy_violation"


def test_rows_that_wait_for_a_later_run_are_no_failures(stored: StoredManifests) -> None:
    waiting = [stored.row(n, status=status) for n, status in enumerate(["deferred", "submitted"])]
    stored.write(waiting)
    assert stored.check(build_failure_share_check).passed


@pytest.mark.parametrize("shares", [(0.2, 0.1), (-0.1, 0.1), (0.1, 1.1)])
def test_shares_that_cannot_be_are_refused(shares: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="must be shares"):
        build_failure_share_check(MANIFEST, warn_above=shares[0], error_above=shares[1])
