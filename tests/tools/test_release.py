"""What `make release` writes into pyproject.toml and CHANGELOG.md, and what it refuses."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from tools.release import ReleaseError, changelog_of, check_tag, project_of, texts

ROOT = Path(__file__).parents[2]
DAY = date(2026, 12, 1)
PROJECT = '[project]\nname = "krea-dagster"\nversion = "0.1.0"\n'
CHANGELOG = "# Changelog\n\n## Unreleased\n\n### Added\n\n- A thing.\n\n## 0.1.0 (2026-11-01)\n"


def test_what_is_unreleased_gets_the_version_and_the_day() -> None:
    assert changelog_of(CHANGELOG, "0.2.0", DAY) == (
        "# Changelog\n\n## Unreleased\n\n## 0.2.0 (2026-12-01)\n\n### Added\n\n- A thing.\n\n"
        "## 0.1.0 (2026-11-01)\n"
    )
    assert 'version = "0.2.0"\n' in project_of(PROJECT, "0.2.0")


@pytest.mark.parametrize(
    ("changelog", "error"),
    [
        (CHANGELOG.replace("0.1.0", "0.2.0"), "has 0.2.0 already"),
        (CHANGELOG.replace("## Unreleased\n", ""), "has no line '## Unreleased'"),
        (CHANGELOG.replace("- A thing.", ""), "says of nothing"),
        (CHANGELOG.replace("### Added", "### Improved"), "use Added, Changed, Fixed"),
        (CHANGELOG.replace("### Added", "### Fixed\n\n### Added"), "use Added, Changed, Fixed"),
    ],
)
def test_a_changelog_that_says_too_little_is_refused(changelog: str, error: str) -> None:
    with pytest.raises(ReleaseError, match=error):
        changelog_of(changelog, "0.2.0", DAY)


@pytest.mark.parametrize(("version", "error"), [("0.0.9", "is older"), ("next", "is no version")])
def test_a_version_that_is_no_new_one_is_refused(version: str, error: str) -> None:
    with pytest.raises(ReleaseError, match=error):
        project_of(PROJECT, version)


def test_a_tag_is_the_version_of_both_files() -> None:
    check_tag("v0.1.0", PROJECT, CHANGELOG)
    with pytest.raises(ReleaseError, match=r"tag is v0\.2\.0"):
        check_tag("v0.2.0", PROJECT, CHANGELOG)
    with pytest.raises(ReleaseError, match="has no part for"):
        check_tag("v0.1.0", PROJECT, "# Changelog\n\n## Unreleased\n")


def test_this_repository_can_be_released() -> None:
    project, changelog = texts()
    assert "## Unreleased\n\n## 99.0.0 (2026-12-01)\n" in changelog_of(changelog, "99.0.0", DAY)
    assert 'version = "99.0.0"' in project_of(project, "99.0.0")
