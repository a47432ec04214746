"""The command: the summary on stdout, progress on stderr, and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from krea_dagster.cli.export import export_command
from krea_dagster.curation.export.image_content import ImagesNotAsStored
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.verdict_log import KEEP, REJECT, Verdict
from krea_dagster.errors import ConfigError, InputError
from tests.curation.export.export_project import ExportProject


@pytest.fixture
def project(tmp_path: Path) -> ExportProject:
    project = ExportProject(str(tmp_path / "krea"))
    project.write_accepted(project.rows(20))
    return project


def run(project: ExportProject, *arguments: str) -> click.testing.Result:
    return CliRunner().invoke(
        export_command, arguments, env={"KREA_STORAGE": project.root}, catch_exceptions=True
    )


def test_it_publishes_below_the_storage_root_and_prints_where(project: ExportProject) -> None:
    ran = run(project, "--split", "train=0.8", "--split", "test=0.2", "--format", "webdataset")
    assert ran.exit_code == 0, ran.output
    home = Path(project.root) / "exports" / "webdataset"
    version = (home / "LATEST").read_text().strip()
    assert f"version    {home / version}" in ran.stdout
    assert "credits    18 for these images" in ran.stdout
    assert "materialize near_duplicates first" in ran.stderr


def test_an_image_that_was_rejected_since_is_named_and_nothing_is_published(
    project: ExportProject,
) -> None:
    row = project.rows(1)[0]
    names = ("request_key", "prompt_id", "sample", "attempt", "partition_key")
    with closing(Journal(f"sqlite:///{project.root}/journal.db")) as journal:
        about = {name: row[name] for name in names}
        journal.verdicts.add([Verdict("1", row["image_sha256"], REJECT, "ann", **about)])
    ran = run(project)
    assert isinstance(ran.exception, ConfigError)
    assert "1 of these images were rejected or flagged" in str(ran.exception)
    assert row["prompt_id"] in str(ran.exception)
    assert not (Path(project.root) / "exports").exists()


def test_verdicts_are_columns_and_it_says_what_was_never_judged(
    project: ExportProject, tmp_path: Path
) -> None:
    row = project.rows(1)[0]
    project.write_listed(project.rows(2, 20), "b")
    names = ("request_key", "prompt_id", "sample", "attempt", "partition_key")
    about = {name: row[name] for name in names}
    with closing(Journal(f"sqlite:///{project.root}/journal.db")) as journal:
        kept = Verdict("1", row["image_sha256"], KEEP, "ann", reason="calm", **about)
        journal.verdicts.add([kept])
    ran = run(project, "--verdicts", "--format", "jsonl", "--to", str(tmp_path / "out"))
    assert "19 of 20 images were never judged" in ran.stderr
    assert "1 partitions have no accepted images yet, and are not in it: b" in ran.stderr
    lines = (tmp_path / "out" / "latest" / "train.jsonl").read_text().splitlines()
    reasons = {one["prompt_id"]: one["verdict_reason"] for one in map(json.loads, lines)}
    assert reasons[row["prompt_id"]] == "calm"
    assert set(reasons.values()) == {"calm", None}


def test_only_json_is_on_stdout(project: ExportProject, tmp_path: Path) -> None:
    ran = run(project, "--json", "--to", str(tmp_path / "out"), "--where", "category=sea")
    figures = json.loads(ran.stdout)
    assert figures["images"] == figures["left_out_by_filter"] == 10
    assert figures["path"] == str(tmp_path / "out" / figures["version"])


def test_the_card_names_the_prompt_table_without_credentials(
    project: ExportProject, tmp_path: Path
) -> None:
    for source, said in (
        ("/home/ada/secret/prompts.parquet", "- Prompts: prompts.parquet\n"),
        ("s3://ada:secret@bucket/p.parquet?secret=1", "- Prompts: s3://bucket/p.parquet\n"),
        ("postgresql://ada:secret?secret#@host/db", "- Prompts: postgresql://host/db\n"),
    ):
        ran = CliRunner().invoke(
            export_command,
            ["--to", str(tmp_path / "out")],
            env={"KREA_STORAGE": project.root, "KREA_PROMPTS": source},
        )
        assert ran.exit_code == 0, ran.output
        card = (tmp_path / "out" / "latest" / "README.md").read_text()
        assert said in card
        assert "secret" not in card


def test_invalid_options_are_input_errors_and_bad_images_are_not(project: ExportProject) -> None:
    """The command group exits with 2 for the former, and with 1 for the latter."""
    assert isinstance(run(project, "--split", "train=0.5").exception, ConfigError)
    assert isinstance(run(project, "--where", "nope=1").exception, ConfigError)
    Path(project.row(3)["image_path"]).unlink()
    error = run(project).exception
    assert isinstance(error, ImagesNotAsStored)
    assert not isinstance(error, InputError)
    assert [bad.prompt_id for bad in error.bad] == ["row-0003"]


def test_help_imports_nothing_large() -> None:
    code = (
        "import sys; from krea_dagster.cli.export import export_command; "
        "print([name for name in ('pyarrow', 'numpy', 'dagster') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
