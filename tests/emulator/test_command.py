"""The command as a process: its output, its exit, and that a kill loses nothing."""

from __future__ import annotations

import contextlib
import fcntl
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from krea_dagster.emulator import FAULTS, emulator_command
from tests.emulator.harness import AUTH, PLAIN

KEY = "key-0000000000000001"
BODY = {"model": "krea-2-turbo", "prompt": "a fox", "seed": 7}


@contextlib.contextmanager
def process(*options: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the command on a free port; yield the process and its address."""
    command = [sys.executable, "-m", "krea_dagster.emulator", "--port", "0", *map(str, options)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        try:
            assert running.stdout is not None
            yield running, running.stdout.readline().strip()
        finally:
            running.kill()


def post(url: str) -> httpx.Response:
    headers = {**AUTH, "Idempotency-Key": KEY}
    return httpx.post(f"{url}/v1/images/generations", json=BODY, headers=headers, **PLAIN)


def test_help_lists_every_option_and_the_syntax_of_a_fault() -> None:
    result = CliRunner().invoke(emulator_command, ["--help"])
    assert result.exit_code == 0
    for option in (
        "--host", "--port", "--api-key", "--state", "--latency-s", "--latency-jitter", "--fault",
        "--credits", "--max-concurrent", "--rate", "--no-idempotency", "--no-batch",
        "--other-key", "--foreign-tasks", "--callbacks-to-private", "--callback-ca",
        "--until-unlocked", "--ready-file", "NAME=VALUE", "[emulator: refuse]",
    ):  # fmt: skip
        assert option in result.output


def test_the_faults_can_be_listed() -> None:
    result = CliRunner().invoke(emulator_command, ["--list-faults"])
    assert [line.split()[0] for line in result.output.splitlines()] == list(FAULTS)


@pytest.mark.parametrize(
    "options",
    [["--fault", "nothing=1"], ["--fault", "500"], ["--rate", "0"], ["--latency-s", "-1"]],
)
def test_a_wrong_option_is_a_usage_error(options: list[str]) -> None:
    assert CliRunner().invoke(emulator_command, options).exit_code == 2


def test_it_prints_its_address_and_a_notice_and_stops_cleanly_on_sigterm(tmp_path: Path) -> None:
    ready = tmp_path / "deep" / "ready.json"
    options = ("--ready-file", ready, "--fault", "500=1", "--fault", "stuck=1.0")
    with process(*options, "--state", tmp_path / "state") as (running, url):
        assert json.loads(ready.read_text()) == {
            "url": url,
            "port": int(url.rpartition(":")[2]),
            "pid": running.pid,
        }
        assert [path.name for path in ready.parent.iterdir()] == ["ready.json"]
        assert post(url).status_code == 500
        assert post(url).status_code == 200
        stats = httpx.get(f"{url}/emulator/books", **PLAIN).json()
        assert stats["tasks"][0]["faults"] == ["stuck"]
        running.send_signal(signal.SIGTERM)
        assert running.wait(10) == 0
        assert running.stderr is not None
        said = running.stderr.read()
        assert "synthetic" in said
        assert "nothing is charged" in said
        assert said.count("\n") == 1


def test_a_kill_loses_nothing(tmp_path: Path) -> None:
    with process("--state", tmp_path, "--latency-s", "0") as (running, url):
        first = post(url)
        running.kill()
        running.wait(10)
    with process("--state", tmp_path, "--latency-s", "0") as (_, url):
        again = post(url)
        assert again.headers["idempotency-replayed"] == "true"
        assert again.json() == first.json()
        read = httpx.get(f"{url}/v1/tasks/{first.json()['id']}", headers=AUTH, **PLAIN)
        assert read.json()["results"][0].startswith(url)
        stats = httpx.get(f"{url}/emulator/books", **PLAIN).json()
        assert (stats["submit_posts"], stats["creates"], stats["charged_units"]) == (2, 1, 4_500)


def test_two_keys_are_two_accounts_with_separate_tasks() -> None:
    options = ("--other-key", "other", "--credits", "2", "--foreign-tasks", "unknown")
    with process(*options, "--latency-s", "0") as (_, url):
        task_id = post(url).json()["id"]
        other = {"Authorization": "Bearer other"}
        read = httpx.get(f"{url}/v1/tasks/{task_id}", headers=other, **PLAIN)
        assert (read.status_code, read.json()["error"]["code"]) == (404, "task_not_found")
        credits = httpx.get(f"{url}/v1/credits", headers=other, **PLAIN).json()
        assert credits["data"]["user"]["remaining_credits"] == 2.0


def test_it_stops_once_the_lock_file_is_unlocked(tmp_path: Path) -> None:
    lock = tmp_path / "users.lock"
    lock.touch()
    holder = (
        "import fcntl, sys; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_SH); "
        "print('held', flush=True); input()"
    )
    with (
        lock.open() as mine,
        subprocess.Popen(
            [sys.executable, "-c", holder, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as user,
    ):
        fcntl.flock(mine, fcntl.LOCK_SH)
        assert user.stdout is not None
        user.stdout.readline()
        with process("--until-unlocked", lock) as (running, url):
            fcntl.flock(mine, fcntl.LOCK_UN)
            # The other user still holds it, for longer than the two seconds of grace.
            with pytest.raises(subprocess.TimeoutExpired):
                running.wait(2.7)
            assert httpx.get(f"{url}/emulator/health", **PLAIN).status_code == 200
            user.kill()
            assert running.wait(10) == 0
