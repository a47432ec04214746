"""Processes that are measured, and the page that is written of what they found."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness import Report, peak_bytes, run
from benchmarks.page import page
from benchmarks.pictures import draw, marked


def test_a_process_is_measured_and_says_its_last_line(tmp_path: Path) -> None:
    ran = run(["benchmarks.worker", "table", "--images", "3", "--folder", str(tmp_path)])
    assert (tmp_path / "prompts.parquet").exists()
    assert ran.wall_s >= ran.said["wall_s"] > 0
    assert ran.cpu_s >= ran.said["cpu_s"]
    assert ran.peak_bytes > 10_000_000
    assert peak_bytes() > 10_000_000


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="invalid choice"):
        run(["benchmarks.worker", "no such kind"])


def test_the_page_holds_the_table_the_limits_and_the_conditions() -> None:
    report = Report("makespan", "A title", setting="n = 1", columns=["client", "s"])
    report.add("ours", "1.0")
    report.claim("ratio", 1.2, 1.1)
    report.claim("memory", 10, 20, "MB")
    report.note("A note.")
    written = page([report.as_json()])
    assert "## A title" in written
    assert "| ours | 1.0 |" in written
    assert "| ratio | 1.2 | 1.1 | **no** |" in written
    assert "| memory | 10 MB | 20 MB | yes |" in written
    assert "- A note." in written
    assert "Python 3." in written
    assert Report.from_json(report.as_json()).claims == report.claims


@pytest.mark.parametrize("kind", ["jpeg", "png"])
@pytest.mark.parametrize("size", [60_000, 60_001, 60_005, 200_003])
def test_a_picture_with_its_mark_has_exactly_the_size_that_was_asked_for(
    kind: str, size: int
) -> None:
    head, rest = marked(draw((256, 256), size, kind), kind, 12)
    assert len(head) + len(rest) == size
