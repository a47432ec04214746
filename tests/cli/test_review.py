"""The command ``review``: output, inputs and errors."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from krea_dagster.cli.review import review_command
from krea_dagster.errors import ConfigError
from tests.curation.review.review_harness import TOKEN, Server, make_project


def run(*arguments: str, **environment: str) -> object:
    """Run a command that fails or prints help; return its exception or its output."""
    done = CliRunner(env={"KREA_REVIEW_TOKEN": "", **environment}).invoke(
        review_command, ["--no-open", *arguments]
    )
    return done.exception if isinstance(done.exception, ConfigError) else done.output


def test_the_address_is_printed_and_the_reviewer_is_the_given_one(tmp_path: Path) -> None:
    project = make_project(tmp_path / "krea", rows=16, subjects=1, measured=False)
    server = Server(project, "--reason", "Too dark")
    assert server.url == f"http://127.0.0.1:{server.port}/{TOKEN}/"
    start = httpx.get(f"{server.url}api/start").json()
    assert (start["reviewer"], start["reasons"]) == ("ada", ["Too dark"])
    assert start["title"] == str(project.folder)
    code, said = server.stop()
    assert code == 0
    assert said.splitlines() == ["16 rows; press Ctrl+C to stop."]


def test_the_token_is_not_on_the_browser_s_command_line(tmp_path: Path) -> None:
    """Every user can read a command line; only this user can read the opened page."""
    project = make_project(tmp_path / "krea", rows=16, subjects=1, measured=False)
    browser, seen = tmp_path / "browser", tmp_path / "seen"
    browser.write_text(f'#!/bin/sh\necho "$1" > {seen}.new; mv {seen}.new {seen}\n')
    browser.chmod(0o700)
    server = Server(project, opens=str(browser))
    deadline = time.monotonic() + 60
    while not seen.exists():
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)
    opened = seen.read_text().strip()
    assert opened.startswith("file://")
    assert TOKEN not in opened
    page = Path(opened.removeprefix("file://"))
    assert f'content="0;url={server.url}"' in page.read_text()
    assert page.parent.stat().st_mode & 0o077 == 0
    assert server.stop()[0] == 0
    assert not page.exists()


def test_without_a_journal_there_is_nothing_to_review(tmp_path: Path) -> None:
    said = str(run("--storage", str(tmp_path)))
    assert "there is no journal, so" in said
    assert list(tmp_path.iterdir()) == []


def test_an_object_store_needs_a_journal_of_its_own() -> None:
    assert "KREA_JOURNAL_URL" in str(run("--storage", "memory://project"))


@pytest.mark.parametrize("token", ["short", "with a space in it, and long", "slash/in/it-and-long"])
def test_a_token_that_could_be_guessed_or_breaks_the_address_is_refused(
    tmp_path: Path, token: str
) -> None:
    said = str(run("--storage", str(tmp_path), KREA_REVIEW_TOKEN=token))
    assert "16 to 200 letters" in said
    file = tmp_path / "token"
    file.write_text(f"{token}\n")
    assert "16 to 200 letters" in str(run("--token-file", str(file)))


def test_a_port_in_use_is_reported(tmp_path: Path) -> None:
    project = make_project(tmp_path / "krea", rows=16, subjects=1, measured=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen on 127.0.0.1:{port}" in str(
            run("--storage", str(project.folder), "--port", port)
        )


def test_there_are_nine_keys_for_reasons(tmp_path: Path) -> None:
    assert "at most nine times" in str(run(*["--reason", "why"] * 10))


def test_help_needs_neither_server_nor_tables() -> None:
    assert "KREA_REVIEW_TOKEN" in str(run("--help"))
