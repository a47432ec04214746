"""The command: figures on stdout, progress on stderr, and exit codes that say what happened."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from krea_dagster.curation.export.command import export_command
from krea_dagster.curation.export.image_content import ImagesNotAsStored
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.verdict_log import REJECT, Verdict
from krea_dagster.errors import ConfigError, InputError
from tests.curation.export.stored_images import Shelf


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    shelf = Shelf(str(tmp_path / "krea"))
    shelf.accept(shelf.rows(20))
    return shelf


def run(shelf: Shelf, *arguments: str) -> click.testing.Result:
    return CliRunner().invoke(
        export_command, arguments, env={"KREA_STORAGE": shelf.root}, catch_exceptions=True
    )


def test_it_publishes_below_the_storage_root_and_prints_where(shelf: Shelf) -> None:
    ran = run(shelf, "--split", "train=0.8", "--split", "test=0.2", "--format", "webdataset")
    assert ran.exit_code == 0, ran.output
    home = Path(shelf.root) / "exports" / "webdataset"
    version = (home / "LATEST").read_text().strip()
    assert f"version    {home / version}" in ran.stdout
    assert "credits    18 for these images" in ran.stdout
    assert "materialize near_duplicates first" in ran.stderr


def test_a_verdict_that_came_after_accepted_images_was_made_is_said(shelf: Shelf) -> None:
    row = shelf.rows(1)[0]
    names = ("request_key", "prompt_id", "sample", "attempt", "partition_key")
    with closing(Journal(f"sqlite:///{shelf.root}/journal.db")) as journal:
        assert "rejected or flagged" not in run(shelf).stderr
        about = {name: row[name] for name in names}
        journal.verdicts.add([Verdict("1", row["image_sha256"], REJECT, "ann", **about)])
    ran = run(shelf)
    assert ran.exit_code == 0
    assert "1 of these images was rejected or flagged since accepted_images was made" in ran.stderr
    assert "rejected or flagged" not in run(shelf, "--all").stderr


def test_json_is_all_that_is_on_stdout(shelf: Shelf, tmp_path: Path) -> None:
    ran = run(shelf, "--json", "--to", str(tmp_path / "out"), "--where", "category=sea")
    figures = json.loads(ran.stdout)
    assert figures["images"] == figures["left_out_by_filter"] == 10
    assert figures["path"] == str(tmp_path / "out" / figures["version"])


def test_the_prompt_table_is_named_in_the_card_without_what_is_private(
    shelf: Shelf, tmp_path: Path
) -> None:
    for source, said in (
        ("/home/ada/secret/prompts.parquet", "- Prompts: prompts.parquet\n"),
        ("s3://ada:secret@bucket/p.parquet?secret=1", "- Prompts: s3://bucket/p.parquet\n"),
        ("postgresql://ada:secret?secret#@host/db", "- Prompts: postgresql://host/db\n"),
    ):
        ran = CliRunner().invoke(
            export_command,
            ["--to", str(tmp_path / "out")],
            env={"KREA_STORAGE": shelf.root, "KREA_PROMPTS": source},
        )
        assert ran.exit_code == 0, ran.output
        card = (tmp_path / "out" / "latest" / "README.md").read_text()
        assert said in card
        assert "secret" not in card


def test_wrong_options_are_input_errors_and_bad_images_are_not(shelf: Shelf) -> None:
    """The command group makes exit code 2 of the former, and 1 of the latter."""
    assert isinstance(run(shelf, "--split", "train=0.5").exception, ConfigError)
    assert isinstance(run(shelf, "--where", "nope=1").exception, ConfigError)
    Path(shelf.row(3)["image_path"]).unlink()
    error = run(shelf).exception
    assert isinstance(error, ImagesNotAsStored)
    assert not isinstance(error, InputError)
    assert [bad.prompt_id for bad in error.bad] == ["row-0003"]


def test_help_is_quick_for_it_imports_nothing_large() -> None:
    code = (
        "import sys; from krea_dagster.curation.export.command import export_command; "
        "print([name for name in ('pyarrow', 'numpy', 'dagster') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
