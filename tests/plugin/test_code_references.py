"""The UI links an asset to the line of the user's code that called this package."""

from __future__ import annotations

import inspect
from pathlib import Path

import dagster as dg

from krea_dagster import build_krea_definitions, build_krea_tables
from krea_dagster.plugin.code_references import caller_reference
from krea_dagster.testing import FakeKrea, write_prompts


def places(defs: dg.Definitions) -> set[tuple[str, int | None]]:
    """Return the file and the line of each asset."""
    found = set()
    for spec in defs.resolve_all_asset_specs():
        value = spec.metadata["dagster/code_references"]
        assert isinstance(value, dg.CodeReferencesMetadataValue)
        (place,) = value.code_references
        assert isinstance(place, dg.LocalFileCodeReference)
        found.add((place.file_path, place.line_number))
    return found


def test_every_asset_has_the_line_that_called_the_factory(tmp_path: Path) -> None:
    table, krea = write_prompts(tmp_path), FakeKrea(storage=str(tmp_path))
    frame = inspect.currentframe()
    assert frame is not None
    line = frame.f_lineno + 1
    defs = build_krea_definitions(prompts=table, krea=krea)
    assert places(defs) == {(__file__, line)}


def test_of_several_tables_too(tmp_path: Path) -> None:
    tables = {"a": {"prompts": write_prompts(tmp_path)}}
    defs = build_krea_tables(
        tables, krea=FakeKrea(storage=str(tmp_path)), spend=False, salvage=False
    )
    ((file, _),) = places(defs)
    assert file == __file__


def test_code_without_a_file_has_none() -> None:
    made: dict[str, object] = {"caller_reference": caller_reference}
    exec("found = caller_reference()", made)  # noqa: S102 - as a notebook does
    assert made["found"] == {}
