"""From bought images to a dataset with commands only: curate, review, export."""

from __future__ import annotations

import json
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.verdict_log import Verdict
from tests.cli.shell import Shell

PROMPTS = ["a quay", "a pier", "a dock"]


@pytest.fixture
def bought(shell: Shell) -> Shell:
    shell.table(prompt=PROMPTS, size=["1:2"] * 3)
    assert shell.run("materialize").code == 0
    return shell


def figures(shell: Shell, *arguments: str) -> Any:
    done = shell.run(*arguments, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def judge(shell: Shell, place: int, verdict: str) -> None:
    """Give a verdict on an image, as a review does."""
    rows = pq.read_table(shell.folder / "krea" / "manifest").to_pylist()
    row = sorted(rows, key=lambda one: str(one["prompt"]))[place]
    names = ("request_key", "prompt_id", "sample", "attempt", "partition_key")
    about = {name: row[name] for name in names}
    with closing(Journal(f"sqlite:///{shell.folder / 'krea' / 'journal.db'}")) as journal:
        key = f"{place} {verdict} {datetime.now(timezone.utc)}"
        journal.verdicts.add([Verdict(key, row["image_sha256"], verdict, "ann", **about)])


def test_images_are_measured_compared_and_accepted(bought: Shell) -> None:
    found = figures(bought, "curate")
    assert (found["images"], found["accepted"]) == (3, 3)
    assert found["rows_by_reason"] == {"accepted": 3}
    assert found["measured_now"] == 0  # the run has measured them
    judge(bought, 0, "reject")
    found = figures(bought, "curate")
    assert found["rows_by_reason"] == {"accepted": 2, "rejected": 1}
    said = bought.run("curate").out
    assert "rows       2 accepted, 1 rejected" in said


def test_rules_and_numbers_are_options(bought: Shell) -> None:
    judge(bought, 1, "keep")
    assert figures(bought, "curate", "--require-keep")["accepted"] == 1
    found = figures(bought, "curate", "--accept", "sharpness>=100000000")
    assert found["accepted"] == 0
    (reason,) = found["rows_by_reason"]
    assert "sharpness" in reason
    wanted = figures(bought, "curate", "--wanted", "prompt=2")["wanted"]
    assert [(one["wanted"], one["accepted"]) for one in wanted] == [(2, 1)] * 3


def test_an_export_makes_the_accepted_images_if_there_are_none(bought: Shell) -> None:
    assert not (bought.folder / "krea" / "accepted").exists()
    assert figures(bought, "export")["images"] == 3


def test_an_image_that_was_rejected_since_is_never_exported(bought: Shell) -> None:
    assert figures(bought, "export")["images"] == 3
    latest = bought.folder / "krea" / "exports" / "parquet" / "LATEST"
    before = latest.read_text()
    judge(bought, 2, "reject")
    refused = bought.run("export")
    assert refused.code == 2
    assert "1 of these images were rejected or flagged since they were accepted" in refused.err
    assert "krea-dagster curate" in refused.err
    assert latest.read_text() == before
    bought.run("curate")
    assert figures(bought, "export")["images"] == 2


def test_without_images_there_is_nothing_to_curate(shell: Shell, tmp_path: Path) -> None:
    done = shell.run("curate")
    assert (done.code, "has no journal yet" in done.err) == (2, True)
    assert not (tmp_path / "krea").exists()
