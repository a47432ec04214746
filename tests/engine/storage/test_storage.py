"""A storage root behind a URL is read each time, because other hosts write to it too."""

from __future__ import annotations

from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from krea_dagster.engine.storage.storage import Storage


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
