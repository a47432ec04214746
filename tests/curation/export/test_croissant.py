"""croissant.json: the files and the columns of a version. ``make export-test`` reads it back."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from krea_dagster.curation.export.export import Exported, export
from krea_dagster.curation.export.spec import ExportSpec, Form
from tests.curation.export.export_project import ExportProject
from tests.curation.export.test_export import FORMS


@pytest.fixture
def project(tmp_path: Path) -> ExportProject:
    return ExportProject(str(tmp_path / "krea"))


def described(exported: Exported) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(exported.path) / "croissant.json").read_text())
    return found


@pytest.mark.parametrize("form", FORMS)
def test_it_names_every_table_shard_and_image_file(
    project: ExportProject, tmp_path: Path, form: Form
) -> None:
    project.write_accepted(project.rows(9))
    spec = ExportSpec.parse(form=form, splits=["train=0.5", "test=0.5"], license="cc-by-4.0")
    exported = export(project.storage, spec, str(tmp_path / "out"))
    told = described(exported)
    assert told["version"] == f"1.0.0+{exported.version}"
    assert told["license"] == "cc-by-4.0"
    patterns = [one for files in told["distribution"] for one in files["includes"]]
    root = Path(exported.path)
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    named = {name for name in files if any(fnmatch(name, pattern) for pattern in patterns)}
    assert files - named == {"README.md", "croissant.json", "export.json", "index.parquet"}


def test_it_has_the_types_of_the_columns(project: ExportProject, tmp_path: Path) -> None:
    more = {
        "raw": pa.array([b"a", None]),
        "record": pa.array([{"a": 1}, None]),
        "two words": pa.array([True, None]),
    }
    project.write_accepted(project.rows(2), columns=more)
    exported = export(project.storage, ExportSpec(), str(tmp_path / "out"))
    (records,) = described(exported)["recordSet"]
    types = {
        field["name"]: (field["dataType"], field.get("repeated")) for field in records["field"]
    }
    assert types["image"] == ("sc:ImageObject", None)
    assert types["prompt"] == ("sc:Text", None)
    assert types["seed"] == types["exported_bytes"] == ("sc:Integer", None)
    assert types["weight"] == ("sc:Float", None)
    assert types["stored_at"] == ("sc:DateTime", None)
    assert types["tags"] == ("sc:Text", True)
    assert types["two words"] == ("sc:Boolean", None)
    assert not {"raw", "record"} & set(types)
    assert "images/two%20words" in {field["@id"] for field in records["field"]}
