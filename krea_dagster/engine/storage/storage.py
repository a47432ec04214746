"""The storage root: a local folder, or an object store through fsspec.

Files are written atomically: under another name first, then made durable, and then renamed (a
folder) or uploaded (an object store).

A store that does not answer is never mistaken for one without the file: methods that read or write
raise StorageUnavailable, and StorageRefused if it is missing or refuses access.
"""

from __future__ import annotations

import errno
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn, cast
from uuid import uuid4

from krea_dagster import redact
from krea_dagster.engine.record import StoredImage
from krea_dagster.engine.storage import temp_files
from krea_dagster.errors import ConfigError, StorageRefused, StorageUnavailable
from krea_dagster.file_systems import (
    UNTIL_IT_DOES,
    Options,
    kind_of,
    local_path,
    open_url,
    same_kind,
    store_error,
)
from krea_dagster.store_faults import fault_of

#: Error numbers of a mounted folder whose host is not reachable.
_NETWORK: Final = frozenset(
    {
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENOTCONN,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
    }
)

#: Error numbers of a full disk, also while something is uploaded from it.
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})

#: Bytes that are read from a store at once. The clients' defaults are 5 to 50 MiB.
_BLOCK_BYTES: Final = 4 * 1024**2
#: How large files are uploaded: s3fs would hold ten parts of 50 MiB in memory, gcsfs one.
_UPLOAD: Final = {"chunksize": 8 * 1024**2, "max_concurrency": 4}

#: Threads that ask an object store. They wait for it.
STORE_THREADS: Final = 32

#: Kinds of stores whose buckets are made by people.
_WITH_BUCKETS: Final = frozenset({"s3", "gs", "az"})


#: What stores call the version of a file, or the time when it was written, the best first.
_STAMPS: Final = ("ETag", "etag", "version", "LastModified", "last_modified", "mtime", "updated")


class Storage:
    """The storage root: a folder or a URL for fsspec. Names under it use ``/``.

    Args:
        root: The folder or URL.
        options: How fsspec opens the URL (``filesystems.py``).
        called: What messages call it.

    Raises ConfigError if the root cannot be used.
    """

    def __init__(
        self, root: str, options: Options | None = None, *, called: str = "the storage root"
    ) -> None:
        if not root:
            raise ConfigError("the storage root is empty; give a folder or a URL")
        self.options: Options = dict(options or {})
        self._called = called
        self.folder = local_path(root)
        self._fs: Any = None
        self._remote: str | None = None
        if self.folder is None:
            self._connect(root)
        self._folders: set[str] = set()  # known to exist

    def _connect(self, root: str) -> None:
        try:
            self._fs, path = open_url(root, self.options)
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001 - file systems raise different errors
            said = redact.text(str(error), root)
            raise ConfigError(
                f"the storage root {redact.location(root)!r} (KREA_STORAGE) cannot be used: {said}"
            ) from redact.safe_cause(error, root)
        if "file" in _protocols(self._fs):
            self.folder = Path(path).absolute()
        else:
            self._remote = path.rstrip("/")

    def __repr__(self) -> str:
        return f"Storage({redact.location(self.locate(''))!r})"

    def locate(self, name: str) -> str:
        """Return the path or URL of a name."""
        if self.folder is not None:
            return str(self.folder / name)
        return str(self._fs.unstrip_protocol(self._full(name)))

    def shown(self, name: str) -> str:
        """Return the path or URL of a name for people, without user, password and query."""
        return redact.location(self.locate(name))

    def name_of(self, location: str) -> str:
        """Return the name under the root for an image's path or URL in a manifest.

        This also works if the root was moved after the manifest was written.
        """
        root = f"{self.locate('').rstrip('/')}/"
        if location.startswith(root):
            return location.removeprefix(root)
        _, found, rest = location.rpartition("/images/")
        return f"images/{rest}" if found else location.lstrip("/")

    def options_for(self, url: str) -> Options:
        """Return the options of another path or URL: these, if it is of the same kind."""
        return self.options if same_kind(url, self.locate("")) else {}

    def copy(self, old: str, new: str) -> None:
        """Copy a file of a store within it."""
        with self._trying("copy"):
            self._fs.cp_file(self._full(old), self._full(new))

    def size_bytes(self, name: str) -> int | None:
        """Return the size of a file, or None where there is none."""
        try:
            if self.folder is not None:
                # Not pathlib, which is ten times slower: this is called for every image.
                return os.stat(f"{self.folder}/{name}").st_size  # noqa: PTH116
            return cast("int", self._fs.info(self._full(name))["size"])
        except (FileNotFoundError, NotADirectoryError) as error:
            self._check_missing(error)
            return None
        except Exception as error:  # noqa: BLE001 - file systems raise different errors
            self.fail(error, "read")

    def sizes_bytes(self, names: Sequence[str]) -> list[int | None]:
        """Return the size of each file, None where there is none. A store is asked in parallel."""
        if self.folder is not None or len(names) < 2:
            return [self.size_bytes(name) for name in names]
        with ThreadPoolExecutor(min(len(names), STORE_THREADS)) as pool:
            return list(pool.map(self.size_bytes, names))

    def holds(self, image: StoredImage) -> bool:
        """Return whether an image's file exists with its full size."""
        return self.size_bytes(image.path) == image.bytes

    def ping(self) -> None:
        """Check that the store answers. Raises StorageUnavailable."""
        self.size_bytes("krea-root.json")

    def probe(self) -> None:
        """Write, read, list and remove a small file: what a run needs from a store.

        Does nothing for a folder. Raises StorageRefused, which names what is not permitted.
        """
        if self.folder is not None:
            return
        name, content = f".krea/probe-{uuid4().hex}", b"krea"
        path = self._full(name)
        with self._trying("write"):
            self._fs.pipe_file(path, content)
        with self._trying("read"):
            found = self._fs.cat_file(path)
        with self._trying("list"):
            listed = [size for one, size in self.listed(name) if one == name]
        with self._trying("delete"):
            self._fs.rm_file(path)
        if found != content or listed != [len(content)]:
            raise StorageRefused(
                f"{self._called} {self.shown('')} does not return or list what was just written "
                "there. It must be consistent: a file that was written is read and listed at once."
            )

    def require_bucket(self) -> None:
        """Check that the bucket or container exists. Raises StorageRefused."""
        if self.folder is None and kind_of(self.locate("")) in _WITH_BUCKETS:
            bucket = str(self._remote).partition("/")[0]
            with self._trying("look at"):
                if not self._fs.exists(bucket):
                    raise FileNotFoundError("the bucket does not exist")

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading. Raises FileNotFoundError."""
        try:
            if self.folder is not None:
                return (self.folder / name).open("rb")
            opened = self._fs.open(self._full(name), "rb", block_size=_BLOCK_BYTES)
            return cast("BinaryIO", opened)
        except Exception as error:  # noqa: BLE001 - file systems raise different errors
            self.fail(error, "read")

    def read(self, name: str) -> bytes:
        """Return the bytes of a small file. Raises FileNotFoundError.

        By one request, so that another host may replace the file meanwhile: opening a file of a
        store is a request of its own, and what is then read must not have changed since.
        """
        try:
            if self.folder is not None:
                return (self.folder / name).read_bytes()
            return cast("bytes", self._fs.cat_file(self._full(name)))
        except Exception as error:  # noqa: BLE001 - file systems raise different errors
            self.fail(error, "read")

    def has_files(self, folder: str) -> bool:
        """Return whether there is a file below a folder. Lists as little as possible."""
        return next(self.names(folder), None) is not None

    def names(self, folder: str) -> Iterator[str]:
        """Yield the names of all files below a folder, which may be missing.

        Behind a URL one folder is listed after the other, so that memory is bounded.
        """
        if self.folder is None:
            yield from self._remote_names(folder)
            return
        for parent, folders, files in os.walk(self.folder / folder):
            folders.sort()
            for file in sorted(files):
                yield (Path(parent) / file).relative_to(self.folder).as_posix()

    def _remote_names(self, folder: str) -> Iterator[str]:
        path = self._full(folder).rstrip("/")
        try:
            entries = self._fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError) as error:
            self._check_missing(error)
            return
        except Exception as error:  # noqa: BLE001 - file systems raise different errors
            self.fail(error, "list")
        for entry in sorted(entries, key=lambda one: str(one["name"])):
            found = str(entry["name"]).rstrip("/")
            name = found.removeprefix(f"{self._remote}/")
            if entry["type"] == "directory" and found != path:
                yield from (one for one, _ in self.listed(f"{name}/"))
            elif entry["type"] != "directory":
                yield name

    @property
    def lists_by_prefix(self) -> bool:
        """Whether a part of a folder can be listed, by the beginnings of its names."""
        if self.folder is not None:
            return False
        find = getattr(self._fs, "_find", self._fs.find)
        return "prefix" in inspect.signature(find).parameters

    def listed(self, beginning: str) -> list[tuple[str, int]]:
        """Return the names that begin with a text, with their sizes, sorted; not of a folder root.

        The text is a folder, a slash and the beginning of names, which may be empty.
        """
        folder, _, prefix = beginning.rpartition("/")
        options = {"prefix": prefix} if prefix and self.lists_by_prefix else {}
        try:
            found: dict[str, Any] = self._fs.find(self._full(folder), detail=True, **options)
        except (FileNotFoundError, NotADirectoryError) as error:
            self._check_missing(error)
            return []
        except Exception as error:  # noqa: BLE001 - file systems raise different errors
            self.fail(error, "list")
        start = len(str(self._remote)) + 1
        named = ((path[start:], int(about["size"])) for path, about in sorted(found.items()))
        return [one for one in named if one[0].startswith(beginning)]

    def modified_at(self, name: str) -> datetime | None:
        """Return when a file was last written, UTC; None if that is not known."""
        try:
            if self.folder is not None:
                written_s = (self.folder / name).stat().st_mtime
                return datetime.fromtimestamp(written_s, timezone.utc)
            return cast("datetime", self._fs.modified(self._full(name)))
        except (FileNotFoundError, NotADirectoryError, NotImplementedError) as error:
            self._check_missing(error)
            return None
        except Exception as error:  # noqa: BLE001 - file systems raise different errors
            self.fail(error, "read")

    def stamps(self, folder: str) -> dict[str, str] | None:
        """Return a text for each file below a folder that differs once the file is written again.

        None where the store does not say when its files were written.
        """
        if self.folder is not None:
            found = {name: os.stat(f"{self.folder}/{name}") for name in self.names(folder)}  # noqa: PTH116 - as above
            return {
                name: f"{one.st_size}/{one.st_mtime_ns}/{one.st_ino}" for name, one in found.items()
            }
        entries: dict[str, Any] = {}
        with self._trying("list"), suppress(FileNotFoundError):
            entries = self._fs.find(self._full(folder), detail=True)
        stamps = {}
        for path, about in entries.items():
            known = [about[key] for key in _STAMPS if about.get(key)]
            if not known:
                return None
            stamps[path] = f"{about.get('size')}/{known[0]}"
        return stamps

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield the path of a new file, which is removed afterwards unless it was published."""
        path, descriptor = self.create_temporary()
        os.close(descriptor)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def create_temporary(self) -> tuple[Path, int]:
        """Create an empty file, and return its path and a descriptor, which the caller closes.

        It is in the same file system as a folder root, so that publishing is a rename.
        """
        remote = self.folder is None
        folder = temp_files.own_folder() if self.folder is None else self.folder / temp_files.FOLDER
        path = folder / temp_files.new_name()
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        try:
            if self._make(folder):
                temp_files.remove_abandoned(folder)
            with suppress(FileNotFoundError):  # the folder was removed meanwhile
                return path, os.open(path, flags, 0o644)
            folder.mkdir(parents=True, exist_ok=True)
            return path, os.open(path, flags, 0o644)
        except OSError as error:
            if remote:  # it is this machine's disk that fails, not the store
                raise
            self.fail(error)

    def publish(self, temporary: Path, name: str) -> None:
        """Give a finished file its name, durably. An older file of that name is replaced."""
        try:
            if self.folder is None:
                self._fs.put_file(str(temporary), self._full(name), **self._upload_options)
            else:
                self._rename(temporary, self.folder / name)
        except Exception as error:  # noqa: BLE001 - file systems raise different errors
            self.fail(error, "write")

    def _rename(self, temporary: Path, target: Path) -> None:
        sync_file(temporary)
        self._make(target.parent)
        try:
            temporary.replace(target)
        except FileNotFoundError:  # the folder was removed meanwhile
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(target)
        sync_folder(target.parent)

    def fail(self, error: Exception, doing: str = "") -> NoReturn:
        """Raise the error, or what it means: StorageUnavailable or StorageRefused."""
        root, number = self.locate(""), getattr(error, "errno", None)
        if self.folder is None and number not in _FULL:
            said = store_error(error, root, self.options, called=self._called, doing=doing)
            if said is None and doing == "write" and isinstance(error, FileNotFoundError):
                self.require_bucket()
            if said is not None:
                raise said from (None if self.options else redact.safe_cause(error, root))
        elif number in _NETWORK:
            raise StorageUnavailable(
                f"{self._called} {self.shown('')} does not answer: "
                f"{redact.text(str(error) or type(error).__name__, root)}. {UNTIL_IT_DOES}"
            ) from redact.safe_cause(error, root)
        raise error

    @contextmanager
    def _trying(self, doing: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - file systems raise different errors
            self.fail(error, doing)

    def _check_missing(self, error: Exception) -> None:
        """Fail if it is not only the file that is missing, but its bucket."""
        if self.folder is None and fault_of(error) is not None:
            self.fail(error)

    @property
    def _upload_options(self) -> dict[str, int]:
        put = getattr(self._fs, "_put_file", self._fs.put_file)
        known = inspect.signature(put).parameters
        return {name: value for name, value in _UPLOAD.items() if name in known}

    def write(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        """Write a file through ``write``, atomically."""
        with self.scratch() as temporary:
            with temporary.open("wb") as file:
                write(file)
            self.publish(temporary, name)

    def cache(self, name: str, data: bytes) -> None:
        """Write a file that can be made again, in a root that is a folder.

        Unlike ``write``, neither atomically nor durably: readers must recognize an incomplete file.
        """
        path = cast("Path", self.folder) / name
        try:
            path.write_bytes(data)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        if self.folder is not None:
            (self.folder / name).unlink(missing_ok=True)
            return
        try:
            self._fs.rm_file(self._full(name))
        except (FileNotFoundError, NotADirectoryError) as error:
            self._check_missing(error)
        except Exception as error:  # noqa: BLE001 - file systems raise different errors
            self.fail(error, "delete")

    def _make(self, folder: str | Path) -> bool:
        """Create a folder durably; return False if this object knows that it exists."""
        name = os.fspath(folder)
        if name in self._folders:
            return False
        missing = Path(name)
        parents = [parent for parent in (missing, *missing.parents) if not parent.exists()]
        missing.mkdir(parents=True, exist_ok=True)
        for made in parents:
            sync_folder(made.parent)
        self._folders.add(name)
        return True

    def _full(self, name: str) -> str:
        return f"{self._remote}/{name}" if name else str(self._remote)


def _protocols(fs: Any) -> tuple[str, ...]:
    protocol = fs.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def sync_folder(folder: str | Path) -> None:
    """Make a rename durable: a name is content of the folder, not of the file."""
    sync_file(folder)


def sync_file(path: str | Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
