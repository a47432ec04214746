"""The command of the review: what it says, what it needs, and how it ends."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from krea_dagster.curation.review import review_command
from krea_dagster.errors import ConfigError
from tests.curation.review.review_bench import TOKEN, Server, make_shelf


def run(*arguments: str, **environment: str) -> object:
    """Run the command where it is to end at once; returns what it raised, or what it printed."""
    done = CliRunner(env={"KREA_REVIEW_TOKEN": "", **environment}).invoke(
        review_command, ["--no-open", *arguments]
    )
    return done.exception if isinstance(done.exception, ConfigError) else done.output


def test_the_address_is_printed_and_the_reviewer_is_whom_one_names(tmp_path: Path) -> None:
    shelf = make_shelf(tmp_path / "krea", rows=16, subjects=1, measured=False)
    server = Server(shelf, "--reason", "Too dark")
    assert server.url == f"http://127.0.0.1:{server.port}/{TOKEN}/"
    start = httpx.get(f"{server.url}api/start").json()
    assert (start["reviewer"], start["reasons"]) == ("ada", ["Too dark"])
    assert start["title"] == str(shelf.folder)
    code, said = server.stop()
    assert code == 0
    assert said.splitlines() == ["16 rows; Ctrl+C ends the review."]


def test_without_a_journal_there_is_nothing_to_review(tmp_path: Path) -> None:
    said = str(run("--storage", str(tmp_path)))
    assert "there is no journal yet" in said
    assert list(tmp_path.iterdir()) == []


def test_an_object_store_needs_a_journal_of_its_own() -> None:
    assert "KREA_JOURNAL_URL" in str(run("--storage", "memory://shelf"))


@pytest.mark.parametrize("token", ["short", "with a space in it, and long", "slash/in/it-and-long"])
def test_a_token_that_could_be_guessed_or_breaks_the_address_is_refused(
    tmp_path: Path, token: str
) -> None:
    said = str(run("--storage", str(tmp_path), KREA_REVIEW_TOKEN=token))
    assert "16 to 200 letters" in said
    file = tmp_path / "token"
    file.write_text(f"{token}\n")
    assert "16 to 200 letters" in str(run("--token-file", str(file)))


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    shelf = make_shelf(tmp_path / "krea", rows=16, subjects=1, measured=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen on 127.0.0.1:{port}" in str(
            run("--storage", str(shelf.folder), "--port", port)
        )


def test_there_are_nine_keys_for_reasons(tmp_path: Path) -> None:
    assert "nine times at most" in str(run(*["--reason", "why"] * 10))


def test_help_needs_neither_server_nor_tables() -> None:
    assert "KREA_REVIEW_TOKEN" in str(run("--help"))
