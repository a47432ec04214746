"""Processes that are measured, the page of their figures, and the image files that they fetch."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness import peak_bytes, run
from benchmarks.image_files import draw, marked
from benchmarks.report import Report, page


def test_a_process_is_measured_and_its_last_line_is_its_output(tmp_path: Path) -> None:
    ended = run(["benchmarks.worker", "table", "--images", "3", "--folder", str(tmp_path)])
    assert (tmp_path / "prompts.parquet").exists()
    assert ended.wall_s >= ended.output["wall_s"] > 0
    assert ended.cpu_s >= ended.output["cpu_s"]
    assert ended.peak_bytes > 10_000_000
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
def test_an_image_file_with_its_mark_has_exactly_the_requested_size(kind: str, size: int) -> None:
    head, rest = marked(draw((256, 256), size, kind), kind, 12)
    assert len(head) + len(rest) == size
