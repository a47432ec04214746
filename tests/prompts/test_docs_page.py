"""docs/how-to/prompt-sources.md: its code runs, from its first line to its last."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "prompt-sources.md"


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        exec(compile(block, str(PAGE), "exec", dont_inherit=True), made)  # noqa: S102 - the page's code
    assert made["table"].shown == "the query of the variable SHOP_URL"
    assert callable(made["ideas"])


def test_the_page_names_every_extra_for_a_source() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for extra in ("delta", "iceberg", "adbc", "s3", "gcs", "azure"):
        assert f"`{extra}`" in page
