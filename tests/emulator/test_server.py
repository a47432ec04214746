"""The server in a thread starts and stops at once, also with requests in progress."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import httpx
import pytest

from krea_dagster.emulator import Emulator
from tests.emulator.harness import PLAIN, Clock, EmulatorClient


def test_it_starts_and_stops_and_the_port_is_free_again(tmp_path: Path) -> None:
    with Emulator(state=tmp_path / "a") as emulator:
        assert httpx.get(f"{emulator.url}/emulator/health", **PLAIN).status_code == 200
        port = emulator.port
    with Emulator(state=tmp_path / "b", port=port) as emulator:
        assert emulator.url == f"http://127.0.0.1:{port}"


def test_it_stops_with_requests_in_progress(tmp_path: Path) -> None:
    outcome: list[object] = []

    def wait(client: EmulatorClient) -> None:
        try:
            client.post()
        except httpx.HTTPError as error:
            outcome.append(error)

    with Emulator(state=tmp_path) as emulator:
        client = EmulatorClient(emulator, Clock())
        emulator.world.script("delay_create", arg=60)
        thread = threading.Thread(target=wait, args=(client,))
        thread.start()
        while emulator.stats()["creates"] == 0:
            time.sleep(0.001)
    thread.join(5)
    assert [type(error) for error in outcome] == [httpx.RemoteProtocolError]
    client.close()


def test_after_a_restart_on_another_port_links_have_the_new_address(tmp_path: Path) -> None:
    clock = Clock()
    with Emulator(state=tmp_path, clock=clock, latency_jitter=0) as emulator:
        client = EmulatorClient(emulator, clock)
        task_id = client.finished()
        old = client.fetch(task_id).content
        client.close()
    with Emulator(state=tmp_path, clock=clock) as emulator:
        client = EmulatorClient(emulator, clock)
        assert client.link(task_id).startswith(f"{emulator.url}/files/")
        assert client.fetch(task_id).content == old
        client.close()


def test_a_taken_port_is_an_error_and_leaves_the_state_free(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            Emulator(state=tmp_path, port=port)
    with Emulator(state=tmp_path):
        pass


def test_without_a_folder_the_state_is_deleted_at_the_end() -> None:
    with Emulator() as emulator:
        assert (emulator.state / "emulator.db").exists()
    assert not emulator.state.exists()


def test_ipv6_addresses_are_written_as_such(tmp_path: Path) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        emulator = Emulator(state=tmp_path, host="::1")
    except OSError:
        pytest.skip("no IPv6 here")
    with emulator:
        assert emulator.url.startswith("http://[::1]:")
        assert httpx.get(f"{emulator.url}/emulator/health", **PLAIN).status_code == 200
