"""A TCP port in front of another address, that can be closed for a while."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Iterator


class Gate:
    """Forwards to a port of this machine, or to a Unix socket.

    While it is closed, connections are refused.
    """

    def __init__(self, target: int | str) -> None:
        self._target = target
        self._listening: socket.socket | None = None
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._ended = False
        self.port = 0
        self.open()
        self._thread = threading.Thread(target=self._forward, name="gate", daemon=True)
        self._thread.start()

    @property
    def is_open(self) -> bool:
        return self._listening is not None

    def open(self) -> None:
        with self._lock:
            listening = socket.create_server(("127.0.0.1", self.port))
            self.port = listening.getsockname()[1]
            self._listening = listening
            self._selector.register(listening, selectors.EVENT_READ)

    def close(self) -> None:
        """Refuse connections, and break those that are open."""
        with self._lock:
            if self._listening is not None:
                self._drop(self._listening)
                self._listening = None
            for one in list(self._pairs):
                self._drop(one)
            self._pairs.clear()

    def end(self) -> None:
        self._ended = True
        self.close()
        self._thread.join(timeout=5)
        self._selector.close()

    def _connect(self) -> socket.socket:
        if isinstance(self._target, int):
            return socket.create_connection(("127.0.0.1", self._target))
        server = socket.socket(socket.AF_UNIX)
        server.connect(self._target)
        return server

    def _drop(self, one: socket.socket) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(one)
        one.close()

    def _forward(self) -> None:
        while not self._ended:
            for key, _ in self._selector.select(timeout=0.05):
                with self._lock:
                    self._serve(key.fileobj)

    def _serve(self, one: object) -> None:
        assert isinstance(one, socket.socket)
        try:
            if one is self._listening:
                client, _ = one.accept()
                server = self._connect()
                self._pairs |= {client: server, server: client}
                for end in (client, server):
                    self._selector.register(end, selectors.EVENT_READ)
                return
            if one not in self._pairs:
                return
            if data := one.recv(65536):
                self._pairs[one].sendall(data)
                return
        except OSError:
            pass
        other = self._pairs.pop(one, None)
        self._drop(one)
        if other is not None:
            self._pairs.pop(other, None)
            self._drop(other)


@contextlib.contextmanager
def gate_to(target: int | str) -> Iterator[Gate]:
    gate = Gate(target)
    try:
        yield gate
    finally:
        gate.end()
