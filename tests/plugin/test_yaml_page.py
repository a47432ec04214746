"""docs/reference/yaml.md has every key of the component, its default, and its description."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from krea_dagster import KreaImages
from krea_dagster.plugin.component_sections import (
    Checks,
    CurationSettings,
    ExportSettings,
    FailureShareCheck,
    KreaSettings,
    RowDefaults,
    SampledCheck,
    ScheduleSettings,
    SpendCheck,
)

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "yaml.md"

SECTIONS: dict[str, type[BaseModel]] = {
    "attributes": KreaImages,
    "krea": KreaSettings,
    "defaults": RowDefaults,
    "schedule": ScheduleSettings,
    "curation": CurationSettings,
    "curation.exports.NAME": ExportSettings,
    "checks": Checks,
    "checks.failure_share": FailureShareCheck,
    "checks.files, checks.pictures": SampledCheck,
    "checks.spend": SpendCheck,
}


def tables() -> str:
    """The tables of the page, made from the fields: paste it after a change."""
    parts = []
    for title, model in SECTIONS.items():
        rows = [
            f"| `{name}` | {default_of(field)} | {field.description or ''} |"
            for name, field in model.model_fields.items()
        ]
        parts.append(
            "\n".join([f"## {title}", "", "| key | default | meaning |", "|---|---|---|", *rows])
        )
    return "\n\n".join(parts) + "\n"


def default_of(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "" if field.default_factory else "required"
    if field.default is None or field.default in ("", [], {}):
        return ""
    text = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
    return f"`{text}`"


def test_the_page_has_every_key_with_its_default_and_its_meaning() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page[page.index("## attributes") :] == tables()
