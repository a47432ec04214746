"""A storage root behind a URL is read each time, because other hosts write to it too."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from krea_dagster.engine.journal.root_log import RootMarker
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError, StorageRefused


class Listing(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A file system with cached listings, as those of object stores have."""

    protocol = "listing"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("listing://", "memory://")))

    def find(self, path: str, **kwargs: Any) -> Any:
        found = super().find(path, **kwargs)
        for parent in {name.rpartition("/")[0] for name in found}:
            self.dircache[parent] = super().ls(parent, detail=True)
        return found

    def info(self, path: str, **kwargs: Any) -> Any:  # noqa: ARG002 - fsspec's signature
        path = self._strip_protocol(path).rstrip("/")
        parent = path.rpartition("/")[0]
        if parent in self.dircache:
            for one in self.dircache[parent]:
                if one["name"] == path:
                    return one
            raise FileNotFoundError(path)
        return super().info(path)


@pytest.fixture(autouse=True)
def _registered() -> None:
    fsspec.register_implementation("listing", Listing, clobber=True)
    Listing.store.clear()


def test_a_file_stored_by_another_host_is_found() -> None:
    storage = Storage("listing://bucket/root")
    storage.write("images/aa/1.png", lambda file: file.write(b"12345"))
    assert list(storage.names("images")) == ["images/aa/1.png"]
    elsewhere = Listing(skip_instance_cache=True)
    with elsewhere.open(storage.locate("images/aa/2.png"), "wb") as file:
        file.write(b"123")
    assert storage.size_bytes("images/aa/2.png") == 3
    with elsewhere.open(storage.locate("images/aa/1.png"), "wb") as file:
        file.write(b"1234567890")
    assert storage.size_bytes("images/aa/1.png") == 10


class Refusing(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A store whose credentials do not permit one call."""

    protocol = "refusing"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    refused: ClassVar[str] = ""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("refusing://", "memory://")))

    def _check(self, call: str) -> None:
        if self.refused == call:
            raise PermissionError("Access Denied")

    def pipe_file(self, path: str, value: bytes, **kwargs: Any) -> None:
        self._check("write")
        super().pipe_file(path, value, **kwargs)

    def cat_file(self, path: str, **kwargs: Any) -> Any:
        self._check("read")
        return super().cat_file(path, **kwargs)

    def find(self, path: str, **kwargs: Any) -> Any:
        self._check("list")
        return super().find(path, **kwargs)

    def rm_file(self, path: str) -> None:
        self._check("delete")
        super().rm_file(path)


@pytest.mark.parametrize("refused", ["write", "read", "list", "delete"])
def test_what_the_credentials_do_not_permit_is_named_before_anything_is_bought(
    refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation("refusing", Refusing, clobber=True)
    storage = Storage("refusing://bucket/krea")
    storage.probe()
    monkeypatch.setattr(Refusing, "refused", refused)
    with pytest.raises(StorageRefused, match=rf"access is refused \(tried to {refused}\)"):
        storage.probe()


def test_a_probe_leaves_nothing_behind() -> None:
    storage = Storage(f"memory://{uuid.uuid4().hex}/krea")
    storage.probe()
    assert list(storage.names("")) == []


def test_files_behind_a_url_are_listed_folder_by_folder() -> None:
    storage = Storage(f"memory://{uuid.uuid4().hex}/krea")
    names = ["images/00/1.png", "images/00/2.png", "images/ff/3.png", "manifest/a/b.parquet"]
    for name in names:
        storage.write(name, lambda file: file.write(b"1"))
    assert list(storage.names("images")) == names[:3]
    assert list(storage.names("")) == names
    assert list(storage.names("missing")) == []
    assert storage.listed("images/00/2") == [("images/00/2.png", 1)]
    assert storage.has_files("images")
    assert not storage.has_files("missing")


def test_a_killed_process_leaves_no_temporary_file_of_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    begins_a_file_and_is_killed = (
        "import os, signal, sys\n"
        "from krea_dagster.engine.storage.storage import Storage\n"
        "Storage('memory://bucket/krea').create_temporary()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", begins_a_file_and_is_killed], env=environ, check=False)
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    (left,) = folder.iterdir()
    with Storage("memory://bucket/krea").scratch() as own:
        assert list(folder.iterdir()) == [own]
    assert not left.exists()


def test_another_users_folder_for_temporary_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"krea-dagster-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="TMPDIR"):
        Storage("memory://bucket/krea").create_temporary()


class Replaced(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A store in which another host replaces each file between its opening and its reading."""

    protocol = "replaced"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("replaced://", "memory://")))

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if mode == "rb":
            raise OSError(f"The file {path} has changed")
        return super().open(path, mode, **kwargs)


def test_a_roots_marker_is_read_while_another_host_replaces_it() -> None:
    fsspec.register_implementation("replaced", Replaced, clobber=True)
    storage = Storage("replaced://bucket/krea")
    marker = RootMarker("root", "journal", "token")
    marker.write(storage)
    assert RootMarker.read(storage) == marker
    with pytest.raises(FileNotFoundError):
        storage.read("none.json")
